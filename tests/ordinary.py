"""An ordinary user: what a program may do that is not run as root. These tests themselves often are."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UID = 65534 if os.geteuid() == 0 else os.geteuid()

_IMPORTS = "import deploy.cli"  # what the program needs of the disk before anything else
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapAmb")
_READS_ALL = 2  # CAP_DAC_READ_SEARCH (linux/capability.h)


@functools.cache
def command() -> tuple[list[str], str]:
    """Words to put before a command so that an ordinary user runs it, or none and why there is no such user.

    A Python or a checkout below /root is out of such a user's reach. Then they may read every file, but write
    only their own, and have no other privilege.
    """
    if os.geteuid() != 0:
        return [], ""
    if shutil.which("setpriv") is None:
        return [], "there is no `setpriv` (Debian: util-linux)"
    user = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
    reasons = []
    reading = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    for capabilities in (["--inh-caps=-all"], reading):
        attempt = [*user, *capabilities, "env"]  # setpriv starts what comes next with its own privileges
        done = subprocess.run(
            [*attempt, sys.executable, "-c", _IMPORTS],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            cwd="/",
        )
        if done.returncode == 0:
            return attempt, ""
        reasons.append(" ".join(done.stderr.split())[-200:])
    return [], f"no other user can run {sys.executable} ({'; '.join(reasons)})"


def needed(what: str) -> list[str]:
    """The words of `command`; skips the test of `what` where there is no such user."""
    words, reason = command()
    if reason:
        pytest.skip(f"NOT TESTED, {what}: {reason}")
    return words


def give(directory: Path) -> None:
    """Makes the user own all that is in a directory."""
    if os.geteuid() == 0:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, UID, UID, follow_symlinks=False)


def privileges(pid: int) -> set[int]:
    """The capabilities of a process, by number, but for that of reading every file."""
    held = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _CAPABILITIES:
            held |= int(value, 16)
    return {number for number in range(64) if held >> number & 1} - {_READS_ALL}
