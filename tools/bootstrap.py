"""Makes `.venv`: the pinned packages of a lock and this project, editable. Called by `make`.

Needs only the standard library and runs on any Python >= 3.6, so that it can say which Python is missing.
The Python that is found decides on the lock (stacks.py). A second call finds the stamp of the first and
returns at once. The stamp is written last and names the Python and the digests of what was installed: an
interrupted, moved, damaged or outdated environment is made anew, and so is one of another Python than wanted.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set

from machine import (
    Python,
    SetupError,
    check_disk,
    check_platform,
    check_writable,
    choose_python,
    output_of,
    say,
    version_of,
)
from stacks import PYTHONS, Version, dotted, stack_of

ROOT = Path(__file__).resolve().parent.parent
STAMP = "safedreamer-setup.json"  # in the environment's folder
QUIET = [] if sys.stderr.isatty() else ["--quiet"]  # progress is for people


def main(argv: Optional[List[str]] = None) -> int:
    """Makes or checks the environment of this checkout; returns the exit code."""
    parser = argparse.ArgumentParser(description="Makes .venv from a pinned lock, or checks it.")
    parser.add_argument("--venv", default=".venv", help="folder of the environment, below the checkout")
    parser.add_argument(
        "--cuda", type=int, choices=(0, 1), help="packages for a CUDA card? (default: as before)"
    )
    parser.add_argument(
        "--python", default="", help="command, path, version, classic or modern (default: as before, or any)"
    )
    parser.add_argument("--which", action="store_true", help="print the Python it would take, make nothing")
    args = parser.parse_args(argv)
    cuda = None if args.cuda is None else bool(args.cuda)
    venv = ROOT / args.venv
    if args.which:
        return guarded(lambda: print(choose_python(args.python, venv, bool(cuda)).path))
    return guarded(lambda: ensure(ROOT, venv, cuda, args.python))


def guarded(work: Any) -> int:
    """Calls `work()` and turns what can go wrong into a sentence and an exit code."""
    try:
        work()
    except SetupError as error:
        say(f"failed: {error}")
        return 2
    except OSError as error:  # a full disk, a file that belongs to someone else
        say(f"failed: {error}. Put that right and run the same command again.")
        return 2
    except KeyboardInterrupt:
        say("interrupted; run the same command again.")
        return 130
    return 0


def ensure(root: Path, venv: Path, cuda: Optional[bool] = None, python: str = "") -> None:
    """Leaves a complete environment `venv` of the checkout `root`.

    `cuda=None` keeps the kind of packages that is there, an empty `python` the Python.
    """
    with one_at_a_time(root):
        stamp = read_stamp(venv)
        cuda = bool(stamp.get("cuda")) if cuda is None else cuda
        base = (None if python else kept_python(stamp)) or choose_python(python, venv, cuda)
        wanted = fingerprint(root, venv, base.version, cuda)
        reason = why_rebuild(venv, stamp, wanted)
        if reason is None and stamp["project"] == wanted["project"]:
            return
        stack = stack_of(base.version)
        check_platform(stack, cuda)
        check_writable(root)
        if reason is not None:
            lock = root / stack.lock(cuda)
            check_disk(venv, stack.needed_gb[cuda])
            say(f"{reason}: installing {lock.name} into {venv.name}, with Python {wanted['python']}")
            remove(venv)
            make_venv(base, venv)
            install_lock(venv, lock)
            stamp = {"base": base.path, "packages": installed(venv, lock)}
        install_project(venv, root)
        write_stamp(venv, {**stamp, **wanted})
        say("ready")


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Holds a lock on the folder, so that two `make` at once do not build into each other."""
    folder = os.open(str(root), os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running in this folder; waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no such lock: go on without
            pass
        yield
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------ what is there


def kept_python(stamp: Dict[str, Any]) -> Optional[Python]:
    """The Python that the environment was made with, if it is still there and still serves."""
    path = str(stamp.get("base", ""))
    version = version_of(path)
    if version is None or version not in PYTHONS or dotted(version) != stamp.get("python"):
        return None
    return Python(path, version)


def fingerprint(root: Path, venv: Path, version: Version, cuda: bool) -> Dict[str, Any]:
    """What a finished set-up writes into its stamp, beside the Python and the packages that it found."""
    return {
        "python": dotted(version),
        "cuda": cuda,
        "lock": digest(root / stack_of(version).lock(cuda)),
        "project": digest(root / "pyproject.toml"),
        "path": str(venv),  # scripts hold it: a moved checkout needs a new environment
    }


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; SetupError if it is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise SetupError(f"{path} is missing. Restore it with: git checkout -- {path}") from None


def read_stamp(venv: Path) -> Dict[str, Any]:
    """The stamp of the last finished set-up, or {} if there is none that can be read."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, stamp: Dict[str, Any]) -> None:
    """Writes the stamp in one step: it is there whole or not at all."""
    half = venv / (STAMP + ".tmp")
    half.write_text(json.dumps(stamp, indent=1))
    os.replace(str(half), str(venv / STAMP))


def why_rebuild(venv: Path, stamp: Dict[str, Any], wanted: Dict[str, Any]) -> Optional[str]:
    """Why the environment must be made (anew), or None if its packages can stay."""
    name = venv.name
    if not venv.exists():
        return f"no {name} yet"
    if not stamp:
        return f"{name} is not finished"
    if stamp.get("path") != wanted["path"]:
        return f"{name} belongs to another folder"
    if stamp.get("python") != wanted["python"]:
        return f"{name} has Python {stamp.get('python', 'of an older set-up')}"
    if stamp.get("lock") != wanted["lock"]:
        return "the pinned packages have changed"
    version = version_of(str(python_of(venv)))
    if version is None or dotted(version) != wanted["python"]:
        return f"{name} has no working Python {wanted['python']}"
    there = metadata_folders(venv)
    lost = [package for package in stamp.get("packages", []) if package not in there]
    return f"{name} has lost {lost[0]} ({len(lost)} in all)" if lost else None


def installed(venv: Path, lock: Path) -> List[str]:
    """Packages of the lock as they are installed, by the names of their metadata folders."""
    wanted = [canonical(pin.replace("==", "-")) for pin in pins(lock)]
    return sorted(metadata_folders(venv).intersection(wanted))


def metadata_folders(venv: Path) -> Set[str]:
    """Names and versions of all packages of an environment."""
    folders = venv.glob("lib/python3.*/site-packages/*.dist-info")
    return {canonical(folder.name[: -len(".dist-info")]) for folder in folders}


def pins(lock: Path) -> List[str]:
    """Lines `name==version` of a lock."""
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line]


def python_of(venv: Path) -> Path:
    """The interpreter of an environment."""
    return venv / "bin" / "python"


def canonical(name: str) -> str:
    """Form of a package's name that does not depend on its spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ----------------------------------------------------------------------------------------- installing


def remove(venv: Path) -> None:
    """Removes an environment, finished or not; SetupError for a `.venv` that is something else."""
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        if any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists() and not (venv / "bin").exists():
            raise SetupError(f"{venv} is no Python environment. Move it away and run the same command again.")
        shutil.rmtree(str(venv))


def make_venv(python: Python, venv: Path) -> None:
    """Makes an environment that holds nothing but pip."""
    if run([python.path, "-m", "venv", str(venv)], quiet=True):
        return
    uv = shutil.which("uv")  # makes one where Debian's Python came without its venv module
    if uv and run([uv, "venv", "--quiet", "--clear", "--seed", "--python", python.path, str(venv)]):
        return
    shutil.rmtree(str(venv), ignore_errors=True)
    raise SetupError(
        f"{python.path} cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt-get "
        f"install python{dotted(python.version)}-venv) or uv, and run the same command again."
    )


def install_lock(venv: Path, lock: Path) -> None:
    """Installs exactly the pins of the lock: with uv where it can be had, else with pip."""
    uv = find_uv(venv, lock)
    # Compiled now: a training starts a dozen processes, and some environments forbid Python to keep bytecode.
    options = ["--compile-bytecode", *QUIET, "--python", str(python_of(venv)), "--no-deps"]
    if uv is None:
        say("uv is not to be had here; pip takes a few minutes")
    elif run([uv, "pip", "install", *options, "-r", str(lock)]):
        return
    else:
        say("uv could not install the packages; trying pip (a few minutes), which may know another index")
    if not run([*pip_install(venv), "-r", str(lock)]):
        raise SetupError(
            "the packages could not be installed; the reason stands above. Check the connection to the "
            "package index and the space on the disk, then run the same command again."
        )


def find_uv(venv: Path, lock: Path) -> Optional[str]:
    """The uv on PATH, else the one that the lock pins, installed into `venv`; None if neither works."""
    installed = shutil.which("uv")
    if installed and output_of([installed, "--version"]):
        return installed
    pinned = [pin for pin in pins(lock) if pin.startswith("uv==")]
    return str(venv / "bin" / "uv") if pinned and run([*pip_install(venv), *pinned], quiet=True) else None


def install_project(venv: Path, root: Path) -> None:
    """Installs the checkout itself, editable, with the build tools of the lock: nothing is downloaded."""
    if not run([*pip_install(venv), "--no-build-isolation", "--editable", str(root)]):
        raise SetupError("the project itself could not be installed; the reason stands above.")


def pip_install(venv: Path) -> List[str]:
    """Beginning of a pip command that resolves nothing."""
    return [str(python_of(venv)), "-m", "pip", "--disable-pip-version-check", "install", *QUIET, "--no-deps"]


def run(command: List[str], quiet: bool = False) -> bool:
    """Runs a command to its end, its output on stderr or, if `quiet`, nowhere. True if it succeeded."""
    output = subprocess.DEVNULL if quiet else sys.stderr
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output).returncode == 0
    except OSError as error:
        say(f"{command[0]}: {error.strerror}")
        return False


if __name__ == "__main__":
    sys.exit(main())
