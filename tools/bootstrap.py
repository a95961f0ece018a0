"""Makes `.venv`: the pinned packages of the lock and this project, editable. Called by `make`.

Needs only the standard library and runs on any Python >= 3.6, so that it can say which Python is missing.
A second call finds the stamp of the first and returns at once. The stamp is written last and names the
digests of what was installed: an interrupted, moved, damaged or outdated environment is made anew.
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
from typing import Any, Dict, Iterator, List, Optional

from machine import (
    PYTHON,
    SetupError,
    check_disk,
    check_platform,
    check_writable,
    find_python,
    output_of,
    say,
    version_of,
)

ROOT = Path(__file__).resolve().parent.parent
STAMP = "safedreamer-setup.json"  # in the environment's folder
LOCKS = {False: "requirements.lock", True: "requirements-cuda.lock"}  # by `cuda`
# 3.0 and (without bytecode) 7.9 for the environment, the rest for what was downloaded.
NEEDED_GB = {False: 4.0, True: 12.0}
QUIET = [] if sys.stderr.isatty() else ["--quiet"]  # progress is for people


def main(argv: Optional[List[str]] = None) -> int:
    """Makes or checks the environment of this checkout; returns the exit code."""
    parser = argparse.ArgumentParser(description="Makes .venv from the pinned lock, or checks it.")
    parser.add_argument(
        "--cuda", type=int, choices=(0, 1), help="packages for a CUDA card? (default: as before)"
    )
    args = parser.parse_args(argv)
    return guarded(lambda: ensure(ROOT, None if args.cuda is None else bool(args.cuda)))


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


def ensure(root: Path, cuda: Optional[bool] = None) -> None:
    """Leaves a complete `.venv` under `root`; `cuda=None` keeps the kind of packages that is there."""
    venv = root / ".venv"
    with one_at_a_time(root):
        stamp = read_stamp(venv)
        cuda = bool(stamp.get("cuda")) if cuda is None else cuda
        lock = root / LOCKS[cuda]
        wanted = fingerprint(root, cuda)
        reason = why_rebuild(venv, stamp, wanted, lock)
        if reason is None and stamp == wanted:
            return
        check_platform()
        check_writable(root)
        if reason is not None:
            python = find_python(venv)
            check_disk(venv, NEEDED_GB[cuda])
            say(f"{reason}: installing {lock.name} into .venv")
            remove(venv)
            make_venv(python, venv)
            install_lock(venv, lock)
        install_project(venv, root)
        write_stamp(venv, wanted)
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


def fingerprint(root: Path, cuda: bool) -> Dict[str, Any]:
    """What a finished set-up writes into its stamp."""
    return {
        "cuda": cuda,
        "lock": digest(root / LOCKS[cuda]),
        "project": digest(root / "pyproject.toml"),
        "path": str(root / ".venv"),  # scripts hold it: a moved checkout needs a new environment
    }


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; SetupError if it is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise SetupError(f"{path} is missing. Restore it with: git checkout -- {path.name}") from None


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


def why_rebuild(venv: Path, stamp: Dict[str, Any], wanted: Dict[str, Any], lock: Path) -> Optional[str]:
    """Why the environment must be made (anew), or None if its packages can stay."""
    if not venv.exists():
        return "no .venv yet"
    if not stamp:
        return ".venv is not finished"
    if stamp.get("path") != wanted["path"]:
        return ".venv belongs to another folder"
    if stamp.get("lock") != wanted["lock"]:
        return "the pinned packages have changed"
    if version_of(str(python_of(venv))) != PYTHON:
        return ".venv has no working Python 3.11"
    lost = missing(venv, lock)
    return f".venv has lost {lost[0]} ({len(lost)} in all)" if lost else None


def missing(venv: Path, lock: Path) -> List[str]:
    """Pins of the lock that are not installed in that version, by the names of the metadata folders."""
    site = venv / "lib" / "python3.11" / "site-packages"
    there = {canonical(entry.name[: -len(".dist-info")]) for entry in site.glob("*.dist-info")}
    return [pin for pin in pins(lock) if canonical(pin.replace("==", "-")) not in there]


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


def make_venv(python: str, venv: Path) -> None:
    """Makes an environment that holds nothing but pip."""
    if run([python, "-m", "venv", str(venv)], quiet=True):
        return
    uv = shutil.which("uv")  # makes one where Debian's python3.11 came without python3.11-venv
    if uv and run([uv, "venv", "--quiet", "--clear", "--seed", "--python", python, str(venv)]):
        return
    shutil.rmtree(str(venv), ignore_errors=True)
    raise SetupError(
        f"{python} cannot make virtual environments. Install its venv module (Debian 12: apt-get install "
        "python3.11-venv) or uv, and run the same command again."
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
