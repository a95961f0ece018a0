"""What the machine must have for the set-up: platform, room on the disk, Python 3.11.

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
from typing import List, Optional, Tuple

PYTHON = (3, 11)
OLDEST_GLIBC = (2, 28)  # of the wheels in the locks


class SetupError(Exception):
    """Something the user can put right: one clear text, exit code 2."""


def say(text: str) -> None:
    """Writes one line for the user; stdout stays free for the command that follows."""
    print("[setup] " + text, file=sys.stderr, flush=True)


def check_platform() -> None:
    """SetupError unless this is Linux x86_64 with a recent enough glibc."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"this is {system} {machine}, but Reverb exists for Linux x86_64 only. Use such a machine or a "
            "container (docker run --platform linux/amd64 ...)."
        )
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if name != "glibc" or numbers < OLDEST_GLIBC:
        here = f"{name} {version}" if name else "another C library"
        raise SetupError(
            f"the pinned packages need glibc 2.28 or newer, here is {here}. "
            "Use Debian 10, Ubuntu 20.04, RHEL 8 or a later one."
        )


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


def find_python(venv: Path) -> str:
    """A CPython 3.11 outside `venv`: python3.11, python3, python, then one that uv knows."""
    others = []
    for path in [*on_path("python3.11"), *on_path("python3"), *on_path("python"), *known_to_uv()]:
        if venv in Path(path).parents:
            continue  # about to be removed
        version = version_of(path)
        if version == PYTHON:
            return path
        if version is not None:
            others.append(f"{path} is {version[0]}.{version[1]}")
    raise SetupError(
        "Python 3.11 is needed (there is no Reverb for newer ones) and was not found"
        + (f"; {', '.join(others)}" if others else "")
        + ". Install it (Debian 12: apt-get install python3.11 python3.11-venv; anywhere: uv python install "
        "3.11) and run the same command again."
    )


def on_path(name: str) -> List[str]:
    """Every executable of that name, in the order of PATH."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    paths = dict.fromkeys(os.path.join(folder, name) for folder in folders if folder)
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def known_to_uv() -> List[str]:
    """The Python 3.11 that uv has installed or knows of, if any."""
    uv = shutil.which("uv")
    path = output_of([uv, "python", "find", "--no-project", "3.11"]) if uv else ""
    return [path] if path else []


def version_of(python: str) -> Optional[Tuple[int, ...]]:
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
