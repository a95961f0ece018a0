"""The same run as real processes: under a Ray of this session, and as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from common import checkpoint
from common.config import Config
from common.configuration import to_dict
from common.metrics import EPISODES, METRICS
from common.sinks import read_jsonl
from common.types import UserError
from deploy import run_dir as runs
from deploy.outcome import Counters
from replay import backend

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds, for a machine that does much else


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return bool(condition())


def updates(run: Path) -> int:
    return max((row.get("train/updates", 0) for row in read_jsonl(run / METRICS)), default=0)


def counters(run: Path) -> Counters:
    newest = checkpoint.latest(run / runs.CHECKPOINTS)
    assert newest is not None
    return Counters(**checkpoint.read_meta(newest)["counters"])


# --- under Ray ----------------------------------------------------------------------------------


class Part:
    def __init__(self, fails: bool = False):
        if fails:
            raise UserError("Port 1 can not be used: choose another.")

    def double(self, number: int) -> int:
        return 2 * number

    def user_error(self) -> None:
        raise UserError("training stopped: make\nit smaller")

    def bug(self) -> None:
        raise ZeroDivisionError("by zero")

    def die(self) -> None:
        os._exit(1)


@pytest.fixture
def remote(ray_session: None) -> Iterator[Callable[..., Any]]:
    import ray

    from deploy.local import RayProxy

    handles = []

    def start(*args: Any) -> RayProxy:
        handles.append(ray.remote(num_cpus=0)(Part).remote(*args))
        return RayProxy(handles[-1])

    yield start
    for handle in handles:
        ray.kill(handle)


def test_calls_give_results_or_the_error_itself(remote):
    """Without the traceback that Ray writes into the text of an exception."""
    part = remote()
    assert part.call("double", 4).result(60) == 8
    error = part.call("user_error").exception(60)
    assert type(error) is UserError
    assert str(error) == "training stopped: make\nit smaller"
    assert "Traceback" in str(error.__cause__) or "user_error" in str(error.__cause__)  # for the log
    assert type(part.call("bug").exception(60)) is ZeroDivisionError
    assert part.call("double", 5).result(60) == 10  # it lives on
    assert not isinstance(part.call("die").exception(60), UserError)


def test_an_error_in_a_constructor_is_the_answer_to_every_call(remote):
    error = remote(True).call("double", 4).exception(60)
    assert type(error) is UserError
    assert str(error) == "Port 1 can not be used: choose another."


def test_replay_and_metrics_start_without_what_only_others_need():
    heavy = "{'jax', 'equinox', 'optax', 'mujoco', 'tensorflow'}"
    program = f"import sys, deploy.light_parts; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def parts_of(parent: psutil.Process, name: str) -> list[psutil.Process]:
    """Processes below `parent` whose command line holds `name`; one that has ended has no command line."""
    found = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, too
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.timeout(400)
def test_a_run_under_ray_survives_a_killed_actor(ray_session, tmp_path, tiny_config, capsys):
    from deploy.train import train

    changes = {"actors": {"count": 2}, "replay": {"shards": 2}}
    cfg = tiny_config(backend="local", env_steps=30_000, **changes)
    run = runs.create(tmp_path / "run", cfg)
    mine = psutil.Process()

    def kill_one() -> None:
        if wait_until(lambda: updates(run) > 5):
            parts_of(mine, "ray::_Actor")[0].kill()

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    outcome = train(cfg, run, resume=False)
    thread.join()

    assert outcome.signal is None
    assert outcome.counters.restarts == 1
    assert outcome.counters.env_steps >= 30_000
    assert outcome.counters.train_ratio(cfg.learner.prefill) == pytest.approx(8.0, rel=0.1)
    assert outcome.summary is not None
    assert outcome.summary["eval/length"] == 1000
    sources = {row["source"].partition("/")[0] for row in read_jsonl(run / EPISODES)}
    assert sources == {"actor0", "actor1"}
    assert counters(run) == outcome.counters
    assert (run / runs.PLOT).is_file()
    if backend.exists():
        assert "Started replay server" in (run / runs.REPLAY_LOG).read_text()
    table = capsys.readouterr().out
    assert "realised train ratio" in table
    assert f"run: {run}" in table
    leftover = [process for kind in ("_", "Replay", "Metrics") for process in parts_of(mine, f"ray::{kind}")]
    _, alive = psutil.wait_procs(leftover, 20)
    assert not alive, "parts of a run outlive it"


# --- as a user starts it ------------------------------------------------------------------------


class Started:
    """`safedreamer ARGUMENTS` as a process of its own, with everything that it starts."""

    def __init__(self, log: Path, *arguments: object):
        self._log = log
        command = [sys.executable, "-c", "from deploy.cli import main; main()", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(log, "w") as file:
            self.process = psutil.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=env,
                start_new_session=True,
            )
        self.family: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def running(self) -> bool:
        self.family |= set(self.process.children(recursive=True)) if self.process.is_running() else set()
        return self.process.poll() is None

    def wait(self) -> int:
        assert wait_until(lambda: not self.running()), self.output
        return self.process.wait(1)

    def orphans(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(list(self.family), 20)
        return alive

    def end(self) -> None:
        """Whatever a failed test has left."""
        self.running()
        for process in [self.process, *self.family]:
            if process.is_running():
                process.kill()


@pytest.fixture
def safedreamer(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(*arguments: object) -> Started:
        started.append(Started(tmp_path / f"output{len(started)}.txt", *arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()


def file_of(tmp_path: Path, cfg: Config) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(cfg)))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_terminated_goes_on_where_it_was(safedreamer, tmp_path, tiny_config):
    cfg = tiny_config(backend="local", env_steps=10**7, evaluation={"every": 100_000})
    run = tmp_path / "run"
    first = safedreamer("train", "--config", file_of(tmp_path, cfg), "--run-dir", run)
    assert wait_until(lambda: not first.running() or updates(run) > 60), first.output
    assert first.running(), first.output
    assert len(first.family) > 5
    # As `timeout` does it: the process first, then its whole group.
    first.process.send_signal(signal.SIGTERM)
    os.killpg(first.process.pid, signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM, first.output
    assert not first.orphans()
    assert f"stopped and saved; go on with: safedreamer train --resume {run}" in first.output
    assert "Traceback" not in first.output
    before, rows = counters(run), read_jsonl(run / METRICS)
    assert before.updates > 60
    assert (run / runs.REPLAY / "000001").is_dir()
    assert rows[-1]["env_steps"] == before.env_steps

    more = before.env_steps + 3_000
    second = safedreamer("train", "--resume", run, "--env-steps", more)
    assert second.wait() == 0, second.output
    assert not second.orphans()
    assert "realised train ratio" in second.output
    assert f"plot: {run / runs.PLOT}" in second.output
    assert "Traceback" not in second.output
    after, continued = counters(run), read_jsonl(run / METRICS)
    check_continuation(cfg, before, after, rows, continued)
    assert more <= after.env_steps <= more + 2 * cfg.env.action_repeat


def check_continuation(
    cfg: Config, before: Counters, after: Counters, rows: list[dict], continued: list[dict]
) -> None:
    assert continued[: len(rows)] == rows
    new = [row["env_steps"] for row in continued[len(rows) :]]
    assert new[0] == before.env_steps
    assert new == sorted(new)
    walls = [row["wall_seconds"] for row in continued]
    assert all(earlier < later for earlier, later in pairwise(walls))
    evaluated = [row["env_steps"] for row in continued if "eval/return" in row]
    assert len(set(evaluated)) == len(evaluated) >= 2
    # Fewer new steps than the prefill: only a restored buffer lets learning go on at once.
    collected = after.agent_steps - before.agent_steps
    assert 0 < collected < cfg.learner.prefill
    assert after.updates > before.updates
    batch = cfg.learner.batch_size * cfg.learner.batch_length
    assert after.replayed_steps == batch * after.updates
    # The sampler's prefetch weighs the more the shorter a run is.
    assert after.train_ratio(cfg.learner.prefill) == pytest.approx(cfg.learner.train_ratio, rel=0.2)
    assert after.wall_seconds > before.wall_seconds


@pytest.mark.timeout(400)
def test_ctrl_c_saves_and_ends_an_inline_run(safedreamer, tmp_path, tiny_config):
    cfg = tiny_config(env_steps=10**7)
    run = tmp_path / "run"
    started = safedreamer("train", "--config", file_of(tmp_path, cfg), "--run-dir", run)
    assert wait_until(lambda: not started.running() or updates(run) > 5), started.output
    os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does it
    assert started.wait() == 128 + signal.SIGINT, started.output
    assert not started.orphans()
    assert counters(run).updates > 5
    assert "Traceback" not in started.output
    assert "go on with: safedreamer train --resume" in started.output


@pytest.mark.timeout(400)
def test_ctrl_c_before_anything_is_trained_leaves_nothing(safedreamer, tmp_path, tiny_config):
    run = tmp_path / "run"
    started = safedreamer("train", "--config", file_of(tmp_path, tiny_config()), "--run-dir", run)
    assert wait_until(lambda: "compiling" in started.output or not started.running())
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.wait() == 128 + signal.SIGINT, started.output
    assert not started.orphans()
    assert not run.exists()
    assert "Traceback" not in started.output
    assert "world_model.deter, " in started.output  # that it was said before: nothing reads it here
    assert "have no effect on an agent without a latent" in started.output
