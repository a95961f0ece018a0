"""A training as a user starts it, seen from outside: who can reach it, what it may do, what it writes down.

An ordinary user starts it, also where the tests are run by root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from common.config import Config
from common.configuration import load, merge, to_dict
from common.metrics import METRICS
from common.sinks import read_jsonl
from deploy import run_dir as runs
from replay.backend import exists as reverb_exists
from tests import ordinary
from tests.deploy.conftest import TINY
from tests.network import reaches
from tests.stacks import needs_reverb

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"  # what a W&B key looks like
PATIENCE = 200.0  # seconds, for a machine that does much else

Address = tuple[str, int]


@dataclass
class Ran:
    """What a training left, and which addresses its processes listened at while it trained."""

    run: Path
    ray: Path
    code: int
    output: str
    listening: set[Address]
    reached: dict[Address, bool]  # by a connection from this process
    users: set[int]
    privileges: set[int]  # of all processes together


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder of that user, with what the tests have compiled; Ray's sockets need its short path."""
    folder = Path(tempfile.mkdtemp(prefix="sd-", dir="/tmp"))
    shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], folder / "jax", dirs_exist_ok=True)
    ordinary.give(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(home: Path, name: str, cfg: Config, **env: str) -> psutil.Popen:
    """`safedreamer train` by that user, its run and its output in their folder."""
    file = home / f"{name}.yaml"
    file.write_text(yaml.safe_dump(to_dict(cfg)))
    file.chmod(0o644)
    words, _ = ordinary.command()
    command = [*words, sys.executable, "-c", "from deploy.cli import main; main()", "train"]
    command += ["--config", str(file), "--run-dir", str(home / name)]
    own = {"HOME": str(home), "TMPDIR": str(home), "JAX_COMPILATION_CACHE_DIR": str(home / "jax")}
    with open(home / f"{name}.txt", "w") as output:
        return psutil.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=home,
            env=os.environ | own | {"PYTHONPATH": str(ROOT)} | env,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def ran(home: Path) -> Iterator[Ran]:
    """A tiny training under its own Ray, with TensorBoard, W&B (offline) and a key in its environment."""
    run, ray = home / "run", home / "ray"
    process = start(home, "run", config(), WANDB_API_KEY=KEY, RAY_TMPDIR=str(home))
    family: set[psutil.Process] = set()
    try:
        wait_until(lambda: process.poll() is not None or updates(run) > 0)
        assert process.poll() is None, (home / "run.txt").read_text()
        family = {process, *process.children(recursive=True)}
        listening = {address for each in family for address in listens(each)}
        ports = {port for _, port in listening}
        reached = {(host, port): reaches(host, port) for host in (*hosts(), "127.0.0.1") for port in ports}
        users, privileges = allowed(family)
        process.terminate()
        code = process.wait(PATIENCE)
        output = (home / "run.txt").read_text()
        yield Ran(run, ray, code, output, listening, reached, users, privileges)
    finally:
        end(family | {process})


def end(family: set[psutil.Process]) -> None:
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, 20)


def allowed(family: set[psutil.Process]) -> tuple[set[int], set[int]]:
    """Whose the processes are, and what privileges they have."""
    users: set[int] = set()
    privileges: set[int] = set()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # a process that ends
            users |= {each.uids().effective}
            privileges |= ordinary.privileges(each.pid)
    return users, privileges


def config() -> Config:
    changes: dict[str, Any] = {
        "backend": "local",
        "env_steps": 10**7,
        "logging": {"tensorboard": True, "wandb": "offline"},
    }
    return merge(tiny(), changes, "test")


def tiny() -> Config:
    return merge(load(), TINY, "tiny")


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def updates(run: Path) -> int:
    return max((row.get("train/updates", 0) for row in read_jsonl(run / METRICS)), default=0)


def listens(process: psutil.Process) -> list[Address]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == "LISTEN"]
    return []


def hosts() -> list[str]:
    """Addresses of this machine that other machines may know; 127.0.0.2 where it has no network."""
    found = [a for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]
    return [a.address for a in found if not a.address.startswith("127.")] + ["127.0.0.2"]


def is_loopback(host: str) -> bool:
    return ip_address(host.removeprefix("::ffff:")).is_loopback


def files_with(directory: Path, text: str) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


def test_it_trained_and_saved(ran: Ran) -> None:
    assert ran.code == 128 + signal.SIGTERM, ran.output
    assert "stopped and saved" in ran.output


def test_it_needed_no_privilege(ran: Ran) -> None:
    ordinary.needed("a training without privileges")
    assert ran.users == {ordinary.UID}
    assert ran.privileges == set()


@pytest.mark.parametrize("server", [pytest.param("reverb", marks=needs_reverb), "memory"])
def test_it_needs_none_without_ray(home: Path, server: str) -> None:
    ordinary.needed("a training without privileges")
    name = f"inline-{server}"
    process = start(home, name, merge(tiny(), {"env_steps": 400, "replay": {"server": server}}, "test"))
    try:
        code = process.wait(PATIENCE)
    finally:
        end({process})
    assert code == 0, (home / f"{name}.txt").read_text()
    assert (home / name / runs.CHECKPOINTS).stat().st_uid == ordinary.UID


def test_every_process_listens_on_loopback_alone(ran: Ran) -> None:
    """But for one port in the table of sockets, Reverb's, which nobody reaches elsewhere all the same."""
    assert len(ran.listening) > 5
    elsewhere = {port for host, port in ran.listening if not is_loopback(host)}
    assert len(elsewhere) == reverb_exists()
    assert all(ran.reached["127.0.0.1", port] for port in elsewhere)


def test_nothing_of_it_is_reached_from_outside(ran: Ran) -> None:
    assert len(ran.reached) > 10
    for (host, port), reached in ran.reached.items():
        assert not reached or host == "127.0.0.1", f"{host}:{port} answers"


def test_the_key_is_written_nowhere(ran: Ran) -> None:
    assert list((ran.run / "wandb").rglob("*.wandb")), "W&B did not run"
    assert list((ran.run / "tensorboard").iterdir())
    assert KEY not in ran.output
    for directory in (ran.run, ran.ray):
        assert not files_with(directory, KEY)
    assert files_with(ran.run / runs.CHECKPOINTS, "osrp_tracked")  # the search itself finds what is there
