"""Resolves requirements/*.in into the locks and checks who can install them. Called by `make lock`.

Versions that still fit stay as they are; `--upgrade` takes the newest ones. A CUDA lock differs from the CPU
lock only by what CUDA adds. A lock is resolved for the oldest Python of its stack on Linux x86_64; then uv is
asked, for every Python and machine of the stack, whether the same pins suffice and have wheels.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

from bootstrap import ROOT, find_uv, guarded, make_venv, pins
from machine import SetupError, find_python, say
from stacks import LINUX_ARM, LINUX_X86, MAC_ARM, MODERN, PYTHONS, STACKS, Platform, Stack, Version, dotted

TARGETS = {  # as uv calls them; MuJoCo, jaxlib and others ask for glibc 2.28 at most
    LINUX_X86: "x86_64-manylinux_2_28",
    LINUX_ARM: "aarch64-manylinux_2_28",
    MAC_ARM: "aarch64-apple-darwin",
}
NEXT_PYTHON = (3, 14)  # not supported yet: said, but no failure
# No index, no path and no machine is named in a lock.
OUTPUT = ("--quiet", "--no-emit-index-url", "--no-annotate", "--custom-compile-command", "make lock")


def main() -> int:
    """Writes all locks and checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Resolves requirements/*.in into the locks.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    return guarded(lambda: make_locks(upgrade))


def make_locks(upgrade: bool) -> None:
    """Writes and checks the locks with uv, from PATH or from an environment made for the purpose."""
    os.chdir(str(ROOT))  # file names are relative
    with tempfile.TemporaryDirectory() as folder:
        uv = shutil.which("uv") or fetch_uv(Path(folder) / "venv")
        if uv is None:
            raise SetupError("uv could not be installed. Check the connection to the package index.")
        for stack in STACKS:
            for cuda in (False, True):
                resolve(uv, stack, cuda, upgrade)
        failed = [place for place, why in unfit(uv, Path(folder)) if why]
    if failed:
        raise SetupError(f"no complete set of packages for {', '.join(failed)}; the reasons stand above.")


def fetch_uv(venv: Path) -> Optional[str]:
    """Path of a uv installed into a fresh environment, or None."""
    make_venv(find_python(venv, PYTHONS), venv)
    return find_uv(venv, ROOT / MODERN.lock(False))


def resolve(uv: str, stack: Stack, cuda: bool, upgrade: bool) -> None:
    """Writes one lock. That of CUDA takes over the pins of the other."""
    lock = stack.lock(cuda)
    command = compile_command(uv, stack, cuda, LINUX_X86, min(stack.pythons))
    command += ["-c", stack.lock(False)] if cuda else []
    command += ["--upgrade"] if upgrade else []
    done = subprocess.run(
        [*command, *OUTPUT, "-o", lock], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise SetupError(f"uv found no versions that fit together for {lock}; the reason stands above.")
    say(f"wrote {lock}")


def unfit(uv: str, folder: Path) -> Iterator[Tuple[str, str]]:
    """(place, why it can not have its lock or "") of every Python and machine; says so, too."""
    for stack in STACKS:
        for cuda, platforms in stack.platforms.items():
            for platform in platforms:
                for version in sorted(stack.pythons):
                    place = f"{stack.lock(cuda)}, Python {dotted(version)}, {' '.join(platform)}"
                    why = lacking(uv, stack, cuda, platform, version, folder)
                    say(f"{place}: {why or 'complete'}")
                    yield place, why
    for platform in MODERN.platforms[False]:
        why = lacking(uv, MODERN, False, platform, NEXT_PYTHON, folder)
        place = f"Python {dotted(NEXT_PYTHON)}, {' '.join(platform)}"
        say(f"{place}: {f'not yet, {why}' if why else 'complete: it can be added to tools/stacks.py'}")


def lacking(uv: str, stack: Stack, cuda: bool, platform: Platform, version: Version, folder: Path) -> str:
    """What a Python on a machine lacks of its lock, from the tags of the wheels; "" if nothing."""
    lock, found = stack.lock(cuda), folder / "found"
    command = compile_command(uv, stack, cuda, platform, version)
    command += ["-c", lock, *OUTPUT, "--no-build", "--no-header", "-o", str(found)]
    found.write_text("")  # the pins of an older answer would be preferred
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode != 0:
        return " ".join(done.stderr.decode().split()).partition("cause: ")[2] or "uv could not tell"
    more = sorted(set(pins(found)) - set(pins(ROOT / lock)))
    return f"needs {', '.join(more)} as well" if more else ""


def compile_command(uv: str, stack: Stack, cuda: bool, platform: Platform, version: Version) -> List[str]:
    """Beginning of the uv command that resolves a stack for a Python on a machine."""
    command = [uv, "pip", "compile", stack.wishes(cuda)]
    command += ["--python-version", dotted(version), "--python-platform", TARGETS[platform]]
    return [*command, "--override", stack.overrides]


if __name__ == "__main__":
    sys.exit(main())
