"""Faults that are easiest to cause inside one process, on a task that a tiny agent learns in seconds."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common import checkpoint
from common.metrics import EPISODES, METRICS
from common.sinks import read_jsonl
from deploy import run_dir as runs
from deploy.outcome import Outcome
from deploy.train import train
from deploy.workers import count_mixed
from learner.learner import Learner
from tests import synthetic

ENV_STEPS = 5_000


@pytest.fixture(autouse=True)
def line_task(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.use_line_task(monkeypatch)


def run_of(tmp_path: Path, **changes: Any) -> tuple[list[dict[str, Any]], Outcome]:
    """Rows of its metrics, and how a run ended that must end well."""
    settings = {"env_steps": ENV_STEPS, "evaluation": {"every": 0}, "logging": {"every_seconds": 0.2}}
    cfg = synthetic.config(**settings | changes)
    run = runs.create(tmp_path / "run", cfg)
    outcome = train(cfg, run, resume=False)
    assert outcome.counters.env_steps >= ENV_STEPS
    assert outcome.summary is not None
    return read_jsonl(run / METRICS), outcome


def once(action: Callable[[], Any]) -> Callable[[], Any]:
    """`action` at the first call, nothing afterwards."""
    actions = [action]
    return lambda: actions.pop()() if actions else None


def fail(error: Exception) -> None:
    raise error


def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    step = synthetic.LineEnv.step
    steps = iter(range(10**9))

    def spoiled(env: synthetic.LineEnv, actions: Any) -> Any:
        outcome = step(env, actions)
        if env._seeds is None and next(steps) == 60:
            outcome.reward[0] = np.nan
        return outcome

    monkeypatch.setattr(synthetic.LineEnv, "step", spoiled)
    rows, outcome = run_of(tmp_path)
    assert any(row.get("train/bad_in_row", 0) > 0 for row in rows)
    assert outcome.counters.updates > 0
    assert np.isfinite([row["eval/return"] for row in rows if "eval/return" in row]).all()


def test_an_environment_that_raises_costs_its_actor_and_no_other(tmp_path, monkeypatch):
    step = synthetic.LineEnv.step
    break_down = once(lambda: fail(RuntimeError("the simulator diverged")))

    def breaking(env: synthetic.LineEnv, actions: Any) -> Any:
        if env._seeds is None and env._length.max() > 30:
            break_down()
        return step(env, actions)

    monkeypatch.setattr(synthetic.LineEnv, "step", breaking)
    rows, outcome = run_of(tmp_path, actors={"count": 2, "envs": 8})
    assert outcome.counters.restarts == 1
    sources = {row["source"].partition("/")[0] for row in read_jsonl(tmp_path / "run" / EPISODES)}
    assert sources == {"actor0", "actor1"}
    assert not any(row.get("replay/mixed") for row in rows)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    write = checkpoint.write_manifest
    fill_up = once(lambda: fail(OSError(errno.ENOSPC, "No space left on device")))

    def full(*args: Any) -> None:
        fill_up()
        write(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    rows, outcome = run_of(tmp_path, checkpoint={"every_seconds": 0.5})
    assert max(row.get("time/failed_saves", 0) for row in rows) == 1
    newest = checkpoint.latest(tmp_path / "run" / runs.CHECKPOINTS)
    assert newest is not None
    assert checkpoint.read_meta(newest)["env_steps"] == outcome.counters.env_steps


def test_a_learner_that_fails_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    update, save = Learner._update, Learner.save
    saved = threading.Event()
    break_down = once(lambda: fail(RuntimeError("the device is lost")))

    def failing(learner: Learner, batch: Any) -> None:
        if saved.is_set():
            break_down()
        update(learner, batch)

    def saving(learner: Learner, *args: Any) -> None:
        save(learner, *args)
        saved.set()

    monkeypatch.setattr(Learner, "_update", failing)
    monkeypatch.setattr(Learner, "save", saving)
    rows, outcome = run_of(tmp_path, checkpoint={"every_seconds": 0.5})
    assert outcome.counters.restarts == 1
    updates = [row["train/updates"] for row in rows if "train/updates" in row]
    assert updates == sorted(updates)
    assert outcome.counters.updates > outcome.counters.lost_updates
    assert any("recovered/learner" in row for row in rows)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_killed_server_process_is_replaced_and_its_losses_are_counted(tmp_path, shards):
    run = tmp_path / "run"
    checkpoint_dir = runs.replay_dir(run, 0, shards)

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (checkpoint_dir / "000001" / "manifest.json").exists():
                break
            time.sleep(0.05)
        servers = [p for p in psutil.Process().children() if "replay.process" in " ".join(p.cmdline())]
        os.kill(servers[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    several = {"replay": {"capacity": 20_000, "stride": 4, "shards": 2}, "actors": {"count": 2, "envs": 8}}
    changes = several if shards == 2 else {}
    rows, outcome = run_of(tmp_path, env_steps=15_000, checkpoint={"every_seconds": 0.5}, **changes)
    assert outcome.counters.restarts == 1
    assert any(name.startswith("recovered/replay") for row in rows for name in row)
    assert 0 <= outcome.counters.lost_steps < outcome.counters.agent_steps
    assert outcome.counters.train_ratio(800) == pytest.approx(16, rel=0.15)
    assert not any(row.get("replay/mixed") for row in rows)


def test_a_window_of_two_streams_is_recognised():
    first = np.zeros((3, 6), bool)
    last = np.zeros((3, 6), bool)
    first[:, 0] = True
    last[1, 2] = first[1, 3] = True  # an episode ends and the next begins
    assert count_mixed({"is_first": first, "is_last": last}) == 0
    first[2, 4] = True  # another stream begins in the middle
    last[0, 4] = True  # an end without a beginning behind it
    assert count_mixed({"is_first": first, "is_last": last}) == 2
