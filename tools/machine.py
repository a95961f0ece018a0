"""What the machine must have for the set-up: platform, room on the disk, a supported Python.

Standard library only, Python >= 3.6, as for all of the set-up.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from stacks import PYTHONS, STACKS, Stack, Version, dotted

OLDEST_GLIBC = (2, 28)  # of the wheels in the locks
SUPPORTED = f"{', '.join(sorted(map(dotted, PYTHONS))[:-1])} or {dotted(max(PYTHONS))}"


class SetupError(Exception):
    """Something the user can put right: one clear text, exit code 2."""


class Python(NamedTuple):
    """An interpreter to build on."""

    path: str
    version: Version


def say(text: str) -> None:
    """Writes one line for the user; stdout stays free for the command that follows."""
    print("[setup] " + text, file=sys.stderr, flush=True)


def here() -> Tuple[str, str]:
    """System and processor of this machine."""
    return platform.system(), platform.machine()


def check_platform(stack: Stack, cuda: bool) -> None:
    """SetupError unless the stack's packages exist for this machine."""
    if here() not in stack.platforms[cuda]:
        raise SetupError(f"this is {' '.join(here())}, but {why_not_here(stack, cuda)}")
    if platform.system() != "Linux":
        return
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if name != "glibc" or numbers < OLDEST_GLIBC:
        library = f"{name} {version}" if name else "another C library"
        raise SetupError(
            f"the pinned packages need glibc {dotted(OLDEST_GLIBC)} or newer, here is {library}. "
            "Use Debian 10, Ubuntu 20.04, RHEL 8 or a later one."
        )


def why_not_here(stack: Stack, cuda: bool) -> str:
    """The reason and the nearest thing that works."""
    if cuda and here() in stack.platforms[False]:
        return "JAX has no CUDA packages for it. Use CUDA=0."
    others = [
        dotted(version) for other in STACKS if here() in other.platforms[cuda] for version in other.pythons
    ]
    if others:
        return f"{stack.limit}. Use Python {' or '.join(others)}, as in: make train PYTHON=python{others[0]}"
    return f"{stack.limit}. Use such a machine or a container (docker run --platform linux/amd64 ...)."


def check_writable(root: Path) -> None:
    """SetupError unless files can be made in `root`."""
    try:
        tempfile.TemporaryFile(dir=str(root)).close()
    except OSError as error:
        raise SetupError(
            f"cannot write to {root} ({error.strerror}). Use a checkout that belongs to you, or correct its "
            "owner."
        ) from None


def check_disk(venv: Path, needed_gb: float) -> None:
    """SetupError unless the environment fits on the disk, in place of the one that is there."""
    free = (shutil.disk_usage(str(venv.parent)).free + size_of(venv)) / 1e9
    if free < needed_gb:
        raise SetupError(
            f"{free:.1f} GB are free for {venv}, but the packages need {needed_gb:.0f} GB. Free some space, "
            "or move the checkout to a larger disk."
        )


def size_of(folder: Path) -> int:
    """Bytes that removing a folder would free (a file with a second link elsewhere frees nothing)."""
    total = 0
    for path, _, names in os.walk(str(folder)):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            total += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return total


# --------------------------------------------------------------------------------- which Python


def choose_python(wish: str, venv: Path, cuda: bool) -> Python:
    """The Python that the user asks for: a command, a path, a version, a stack's name, or "" for any.

    Raises SetupError if there is none, or if the project does not run on it.
    """
    if not wish:
        return find_python(venv, pythons_here(cuda))
    named = [stack.pythons for stack in STACKS if stack.name == wish]
    if named:
        return find_python(venv, named[0])
    number = re.fullmatch(r"(?:python)?(\d+)\.(\d+)", wish)
    if number:
        version = int(number.group(1)), int(number.group(2))
        return find_python(venv, [supported(wish, version)])
    for path in [wish] if os.sep in wish else on_path(wish):
        version = version_of(path) if outside(venv, path) else None
        if version is not None:
            return Python(os.path.abspath(path), supported(wish, version))
    raise SetupError(
        f"PYTHON={wish} is no 64-bit CPython that runs here. Choose another ({SUPPORTED}), or leave PYTHON "
        "out."
    )


def supported(wish: str, version: Version) -> Version:
    """The version itself; SetupError if the project does not run on it."""
    if version in PYTHONS:
        return version
    raise SetupError(
        f"PYTHON={wish} is Python {dotted(version)}, but there are packages for {SUPPORTED} only. Choose one "
        "of these, or leave PYTHON out."
    )


def pythons_here(cuda: bool) -> List[Version]:
    """Versions that have packages for this machine, the one to take first coming first."""
    stacks = [stack for stack in STACKS if here() in stack.platforms[cuda]]
    if not stacks:
        check_platform(STACKS[-1], cuda)  # says why
    return [version for stack in stacks for version in stack.pythons]


def find_python(venv: Path, versions: Sequence[Version]) -> Python:
    """The first of the versions that is found outside `venv`: on PATH, or installed by uv or pyenv."""
    seen: Dict[str, Optional[Version]] = {}
    for version in versions:
        for path in candidates(version):
            if outside(venv, path) and path not in seen:
                seen[path] = version_of(path)
            if seen.get(path) == version:
                return Python(os.path.abspath(path), version)
    others = [f"{path} is {dotted(version)}" for path, version in seen.items() if version is not None]
    wanted = [dotted(version) for version in versions]
    raise SetupError(
        f"Python {' or '.join(wanted)} is needed and was not found"
        + (f"; {', '.join(others)}" if others else "")
        + f". Install it ({how_to_get(versions[0])}) and run the same command again."
    )


def how_to_get(version: Version) -> str:
    """Commands that install a Python."""
    name = dotted(version)
    systems = {(3, 11): "Debian 12", (3, 12): "Ubuntu 24.04", (3, 13): "Debian 13"}
    packages = f"python{name} python{name}-venv"
    return f"{systems[version]}: apt-get install {packages}; anywhere: uv python install {name}"


def candidates(version: Version) -> Iterator[str]:
    """Where a Python of that version may be."""
    for name in (f"python{dotted(version)}", "python3", "python"):
        yield from on_path(name)
    uv, pyenv = shutil.which("uv"), shutil.which("pyenv")
    managed = output_of([uv, "python", "find", "--no-project", dotted(version)]) if uv else ""
    if managed:
        yield managed
    prefix = (
        output_of([pyenv, "prefix", dotted(version)]) if pyenv else ""
    )  # its shims show chosen versions only
    if prefix:
        yield os.path.join(prefix, "bin", "python")


def outside(venv: Path, path: str) -> bool:
    """Whether a program lies outside the environment, which is about to be removed."""
    return venv not in Path(os.path.abspath(path)).parents


def on_path(name: str) -> List[str]:
    """Every executable of that name, in the order of PATH."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    paths = dict.fromkeys(os.path.join(folder, name) for folder in folders if folder)
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def version_of(python: str) -> Optional[Version]:
    """(major, minor) of a 64-bit CPython, None for anything that does not run or is something else."""
    code = "import sys; print(sys.implementation.name, sys.maxsize > 2**32, *sys.version_info[:2])"
    words = output_of([python, "-c", code]).split()
    if len(words) != 4 or words[:2] != ["cpython", "True"]:
        return None
    return int(words[2]), int(words[3])


def output_of(command: List[str]) -> str:
    """Standard output of a quick command, empty if it fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=60).decode().strip()
    except (OSError, subprocess.SubprocessError):
        return ""
