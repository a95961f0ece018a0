"""Runs on a Ray cluster that somebody else has started: a head with the jobs API, as `ray start` makes it."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
import yaml

from common import checkpoint
from common.configuration import to_dict
from common.metrics import METRICS
from common.sinks import read_jsonl
from deploy import run_dir as runs
from deploy.cli import main
from deploy.outcome import Counters
from replay.server import free_ports

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds, for a machine that does much else
CPUS = 4  # learner and replay two, one actor, the evaluator
# How the titles of processes begin that are parts of runs.
PARTS = ("ray::_", "ray::Holder", "ray::Replay", "ray::Metrics")
KEY = "0123456789abcdef" * 2 + "01234567"


def wait_until(condition: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not condition():
        time.sleep(0.2)
    return bool(condition())


class Head(NamedTuple):
    address: str
    dashboard: str
    files: Path
    process: psutil.Popen

    def parts(self) -> list[str]:
        """Titles of the parts of runs that live on it."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [word for word in process.cmdline()[:1] if word.startswith(PARTS)]
        return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    log = tmp_path_factory.mktemp("head") / "log.txt"
    port, dashboard, agent, client = free_ports(4)
    slow = dict.fromkeys(
        ("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT"), "200"
    )
    bin_ = Path(sys.executable).parent
    path = f"{bin_}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    # Its sockets must have short names.
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/tmp") as files, open(log, "w") as output:
        ports = ["--port", port, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
        resources = ["--num-cpus", CPUS, "--num-gpus", 0, "--object-store-memory", 100_000_000]
        process = psutil.Popen(
            [
                *[bin_ / "ray", "start", "--head", "--block", "--disable-usage-stats"],
                *[
                    "--node-ip-address",
                    "127.0.0.1",
                    "--temp-dir",
                    files,
                    "--ray-client-server-port",
                    str(client),
                ],
                *map(str, ports + resources),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | slow | {"PATH": path, "RAY_agent_register_timeout_ms": "300000"},
            start_new_session=True,
        )
        family: list[psutil.Process] = []
        try:
            assert wait_until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(files), process)
        finally:
            if process.is_running():
                family = process.children(recursive=True)
                process.terminate()
            psutil.wait_procs([process, *family], 10)
            for left in [process, *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            psutil.wait_procs([process, *family], 10)


class Command:
    """`safedreamer ARGUMENTS` as a process of its own."""

    def __init__(self, log: Path, *arguments: object, **env: str):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        assert wait_until(lambda: not self.running()), self.output
        return self.process.wait()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*arguments: object, **env: str) -> Command:
        started.append(Command(tmp_path / f"output{len(started)}.txt", *arguments, **env))
        return started[-1]

    yield start
    for one in started:
        if one.running():
            one.process.kill()
            one.process.wait()


@pytest.fixture
def ask(head: Head, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`safedreamer ARGUMENTS` in this process: its exit code and what it says."""

    def call(*arguments: object) -> tuple[int, str]:
        first, *rest = map(str, arguments)
        with pytest.raises(SystemExit) as stop:
            main([first, "--address", head.dashboard, *rest])
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, said.out + said.err

    return call


class Listener(NamedTuple):
    url: str
    heard: set[str]  # values of Authorization


@pytest.fixture
def wandb() -> Iterator[Listener]:
    """In place of W&B's server: notes who asks, and sends them away."""
    heard: set[str] = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            heard.add(self.headers.get("Authorization", ""))
            self.send_response(403)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Listener(f"http://127.0.0.1:{server.server_port}", heard)
        server.shutdown()


def updates(run: Path) -> float:
    return max((row.get("train/updates", 0) for row in read_jsonl(run / METRICS)), default=0)


def counters(run: Path) -> Counters:
    newest = checkpoint.latest(run / runs.CHECKPOINTS)
    assert newest is not None
    return Counters(**checkpoint.read_meta(newest)["counters"])


def holding(directory: Path, word: bytes) -> list[Path]:
    """Files below a directory that hold the word."""
    found = []
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink() and word in path.read_bytes():
                found.append(path)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_from_its_submission_to_its_resume(head, command, ask, wandb, tmp_path, tiny_config):
    cfg = tiny_config(backend="local", env_steps=10**7)
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(to_dict(cfg)))
    following = command(
        *["submit", "--address", head.dashboard, "--run-dir", run, "--submission-id", "one"],
        *["--", "train", "--config", "config.yaml", "--wandb", "online"],
        WANDB_API_KEY=KEY,
        WANDB_BASE_URL=wandb.url,
        WANDB_PROJECT="mine",
    )
    assert wait_until(lambda: not following.running() or updates(run) > 5), following.output
    assert following.running(), following.output
    assert "learner and replay on" in following.output

    # The key has arrived, and nobody can read it.
    assert wandb.heard == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head.dashboard)
    info = client.get_job_info("one")
    assert info.runtime_env is not None
    assert info.runtime_env["env_vars"]["WANDB_PROJECT"] == "mine"
    for shown in (str(info), requests.get(f"{head.dashboard}/api/jobs/", timeout=30).text):
        assert "WANDB_PROJECT" in shown
        assert KEY not in shown
    assert not holding(head.files, KEY.encode())
    assert not holding(run, KEY.encode())

    # Ctrl-C ends the looking.
    os.killpg(following.process.pid, signal.SIGINT)
    assert following.wait() == 130, following.output
    assert f"safedreamer job stop one --address {head.dashboard}" in following.output
    assert "Traceback" not in following.output
    code, said = ask("job", "status", "one")
    assert (code, "RUNNING" in said, str(run) in said) == (0, True, True)
    assert ask("submit", "--run-dir", tmp_path / "x", "--submission-id", "one", "--", "train") == (
        *(2, "safedreamer: there is a job one already; choose another --submission-id\n"),
    )
    assert "did you mean `one`?" in ask("job", "stop", "onee")[1]

    # It saves before it stops.
    seen = command("job", "logs", "one", "--follow", "--address", head.dashboard)
    code, said = ask("job", "stop", "one")
    assert code == 0, said
    assert "one: STOPPED" in said
    assert f"stopped and saved; go on with: safedreamer train --resume {run}" in said
    assert seen.wait() == 1, seen.output
    assert "compiling" in seen.output
    assert "stopped and saved" in seen.output
    before = counters(run)
    assert before.updates > 5
    assert wait_until(lambda: not head.parts())
    assert "has ended before: STOPPED" in ask("job", "stop", "one")[1]

    # And goes on, by hand on the head.
    more = before.env_steps + 1_000
    again = command(
        "train", "--resume", run, "--env-steps", more, "--ray-address", head.address, "--wandb", "off"
    )
    assert again.wait() == 0, again.output
    assert counters(run).updates > before.updates
    assert more <= counters(run).env_steps <= more + 10 * cfg.env.action_repeat
    assert "realised train ratio" in again.output
    assert wait_until(lambda: not head.parts())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_without_room_says_what_is_missing(head, command, tmp_path):
    run = tmp_path / "run"
    waiting = command(
        *["train", "--run-dir", run, "--ray-address", head.address],
        *["--actors.count", 6, "--ray.placement-seconds", 4],
    )
    assert waiting.wait() == 2, waiting.output
    assert f"within 4 s: it needs 9 CPUs, the cluster has {CPUS}. Start more nodes" in waiting.output
    assert "waits up to 4 s for room" in waiting.output
    assert "Traceback" not in waiting.output
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_exit_code_of_a_job_that_fails(head, ask, tmp_path):
    """Only the cluster can tell that there is no such run on its storage."""
    code, said = ask("submit", "--", "train", "--resume", tmp_path / "nowhere")
    assert code == 1
    assert "is not a run directory" in said
    assert "FAILED" in said
    code, said = ask("job", "list")
    assert code == 0
    assert said.startswith("safedreamer-")
    assert "exit code 2" in said.splitlines()[0]
