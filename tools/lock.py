"""Resolves requirements.in and requirements-cuda.in into the locks. Called by `make lock`.

Versions that still fit stay as they are; `--upgrade` takes the newest ones. The CUDA lock differs from the
CPU lock only by what CUDA adds.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Optional

from bootstrap import LOCKS, ROOT, find_uv, guarded, make_venv, run
from machine import SetupError, find_python, say

CPU_LOCK, CUDA_LOCK = LOCKS[False], LOCKS[True]
TARGET = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
# No index, no path and no machine is named in a lock.
OUTPUT = ("--quiet", "--no-emit-index-url", "--no-annotate", "--custom-compile-command", "make lock")


def main() -> int:
    """Writes both locks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Resolves requirements*.in into the locks.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    return guarded(lambda: resolve(upgrade))


def resolve(upgrade: bool) -> None:
    """Writes both locks with uv, from PATH or from an environment made for the purpose."""
    os.chdir(str(ROOT))  # file names are relative
    with tempfile.TemporaryDirectory() as folder:
        uv = shutil.which("uv") or fetch_uv(Path(folder) / "venv")
        if uv is None:
            raise SetupError("uv could not be installed. Check the connection to the package index.")
        command = [uv, "pip", "compile", *TARGET, *OUTPUT, "--override", "requirements-overrides.txt"]
        command += ["--upgrade"] if upgrade else []
        cpu = [*command, "requirements.in", "-o", CPU_LOCK]
        cuda = [*command, "-c", CPU_LOCK, "requirements-cuda.in", "-o", CUDA_LOCK]
        if not (run(cpu) and run(cuda)):
            raise SetupError("uv found no versions that fit together; the reason stands above.")
    say(f"wrote {CPU_LOCK} and {CUDA_LOCK}")


def fetch_uv(venv: Path) -> Optional[str]:
    """Path of a uv installed into a fresh environment, or None."""
    make_venv(find_python(venv), venv)
    return find_uv(venv, ROOT / CPU_LOCK)


if __name__ == "__main__":
    sys.exit(main())
