"""`safedreamer doctor`: what this machine has, what is missing and what to do about it."""

from __future__ import annotations

import configparser
import importlib.metadata
import netrc
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy import probes
from deploy.probes import ROOT, Check
from deploy.stack import PLATFORMS, PYTHONS, SUPPORTED, lock, stack

CGROUP = Path("/sys/fs/cgroup")  # limits of a container (version 2)
GB = 1e9
COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
WANDB_HOST = "https://api.wandb.ai"


def checks(announce: Callable[[str], None] = lambda name: None) -> Iterator[Check]:
    """Makes the checks one after the other, half a minute in all; `announce` hears the name of the next."""
    for name, check in CHECKS:
        announce(name)
        yield examine(name, check)


def run_doctor(console: Console) -> int:
    """Prints every check as it is made. Exit code: 0 if nothing failed, else 1."""
    failed = []
    with console.status("") as status:
        for check in checks(announce=lambda name: status.update(f"checking {name} ...")):
            console.print(line(check))
            if check.status == "fail":
                failed.append(check.name)
    console.print(f"Failed: {', '.join(failed)}." if failed else "Ready to train.", highlight=False)
    return 1 if failed else 0


def examine(name: str, check: Callable[[str], Check]) -> Check:
    """Makes one check; one that breaks is itself a finding, the others still run."""
    try:
        return check(name)
    except Exception as error:
        return Check(name, "fail", f"the check itself broke: {type(error).__name__}: {error}")


def line(check: Check) -> Table:
    """One check as it is printed, its hint below its detail."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=4, style=COLORS[check.status])
    table.add_column(width=11)
    table.add_column(overflow="fold")
    table.add_row(check.status, check.name, Text(check.detail))
    if check.hint:
        table.add_row("", "", Text(f"-> {check.hint}"))
    return table


# ------------------------------------------------------------------------------- this interpreter


def python(name: str) -> Check:
    """The interpreter's version and place, and which set of packages it takes."""
    detail = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] in PYTHONS:
        return Check(name, "ok", f"{detail}, {stack()} packages")
    hint = f"there are packages for {SUPPORTED}: run `make setup` and .venv/bin/safedreamer"
    return Check(name, "fail", detail, hint)


def system(name: str) -> Check:
    """Operating system and processor: what the packages of this Python exist for."""
    here = f"{platform.system()} {platform.machine()}"
    detail = ", ".join(filter(None, (here, " ".join(platform.libc_ver()))))
    if here in PLATFORMS[stack()]:
        return Check(name, "ok", detail)
    if here in PLATFORMS["modern"]:
        hint = "Reverb exists for Linux x86_64 only; `make setup PYTHON=modern` does without it"
    else:
        hint = f"there are packages for {', '.join(PLATFORMS['modern'])}: use such a machine or container"
    return Check(name, "fail", detail, hint)


def packages(name: str) -> Check:
    """Installed versions against the lock."""
    there = {spelled(dist.name): dist.version for dist in importlib.metadata.distributions()}
    pinned = lock(cuda=any(package.startswith("jax-cuda") for package in there))
    pins = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / pinned).read_text(), re.MULTILINE)
    found = {pin: there.get(spelled(pin), "missing") for pin, _ in pins}
    other = [f"{pin} {found[pin]}" for pin, wanted in pins if found[pin] != wanted]
    if not other:
        return Check(name, "ok", f"{len(pins)} as in {pinned}")
    detail = f"{len(other)} of {len(pins)} not as in {pinned}: {', '.join(other[:5])}"
    return Check(name, "warn", detail, "run `make setup`")


def spelled(package: str) -> str:
    """One spelling per package name."""
    return re.sub(r"[-_.]+", "-", package).lower()


# -------------------------------------------------------------------------------- what there is


def wandb(name: str) -> Check:
    """Where a W&B key is stored; reads no key aloud and asks nobody."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"))
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(folder / "settings")
    except configparser.Error as error:
        detail = f"unreadable settings ({type(error).__name__})"
        return Check(name, "warn", detail, f"mend {folder / 'settings'}")
    stored = dict(settings["default"]) if settings.has_section("default") else {}
    url = os.environ.get("WANDB_BASE_URL") or stored.get("base_url") or WANDB_HOST
    if os.environ.get("WANDB_API_KEY"):
        return Check(name, "ok", "logged in by WANDB_API_KEY")
    if stored.get("api_key"):
        return Check(name, "ok", f"logged in by {folder / 'settings'}")
    for file in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        path = Path(os.path.expanduser(file))
        if path.is_file() and has_login(path, urlsplit(url).hostname or url):
            return Check(name, "ok", f"logged in by {path}")
    return Check(name, "ok", "not logged in (only --logging.wandb online needs it)", "run `wandb login`")


def has_login(path: Path, host: str) -> bool:
    """Whether a netrc file holds a key for the host."""
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def memory(name: str) -> Check:
    """Free memory, within the limit of the container if there is one."""
    free = psutil.virtual_memory().available
    limit = (CGROUP / "memory.max").read_text().strip() if (CGROUP / "memory.max").is_file() else "max"
    if limit != "max":
        statistics = (CGROUP / "memory.stat").read_text().split()
        cache = int(statistics[statistics.index("inactive_file") + 1])  # given back when it is needed
        free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()) + cache)
    hint = "stop other programs, or lower --actors.envs"
    return rated(name, free / GB, "GB free", warn=4, fail=1.5, hint=hint)


def disk(name: str) -> Check:
    """Room where runs are written and where Ray keeps its files; the smaller one counts."""
    places = {place: shutil.disk_usage(place).free / GB for place in (os.getcwd(), tempfile.gettempdir())}
    place = min(places, key=lambda path: places[path])
    return rated(name, places[place], f"GB free in {place}", warn=5, fail=0.5, hint="free some space")


def shared_memory(name: str) -> Check:
    """Size of /dev/shm: on Linux Ray's object store falls back to slow disk without it."""
    if platform.system() != "Linux":
        return Check(name, "ok", f"not used on {platform.system()}")
    size = shutil.disk_usage("/dev/shm").total / GB if os.path.isdir("/dev/shm") else 0.0
    hint = "in Docker: --shm-size=2g; else: mount -o remount,size=2G /dev/shm"
    return rated(name, size, "GB in /dev/shm (Ray passes parameters through it)", warn=1, fail=0, hint=hint)


def cores(name: str) -> Check:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    count = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = (CGROUP / "cpu.max").read_text().split() if (CGROUP / "cpu.max").is_file() else ["max"]
    if quota[0] != "max":
        count = min(count, int(quota[0]) / int(quota[1]))
    hint = "learner and actors take turns: expect slow runs"
    return rated(name, count, "usable", warn=2, fail=0, hint=hint)


def rated(name: str, amount: float, unit: str, *, warn: float, fail: float, hint: str) -> Check:
    """A check of an amount that should not be below two bounds."""
    status = "fail" if amount < fail else "warn" if amount < warn else "ok"
    return Check(name, status, f"{amount:.3g} {unit}", "" if status == "ok" else hint)


CHECKS: tuple[tuple[str, Callable[[str], Check]], ...] = (
    ("python", python),
    ("platform", system),
    ("packages", packages),
    ("cores", cores),
    ("memory", memory),
    ("disk", disk),
    ("/dev/shm", shared_memory),
    ("accelerator", probes.accelerator),
    ("reverb", probes.reverb),
    ("replay port", probes.port),
    ("ray", probes.ray),
    ("rendering", probes.rendering),
    ("wandb", wandb),
)
