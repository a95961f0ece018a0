"""Faults that are easiest to cause inside one process, on a task that a tiny agent learns in seconds."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from common import checkpoint
from common.metrics import EPISODES, METRICS
from common.sinks import read_jsonl
from deploy import run_dir as runs
from deploy.light_parts import ReplayInMemory
from deploy.outcome import Outcome
from deploy.train import train
from deploy.workers import count_mixed
from learner.learner import Learner
from tests import synthetic
from tests.stacks import needs_reverb

ENV_STEPS = 5_000


@pytest.fixture(autouse=True)
def line_task(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.use_line_task(monkeypatch)


class Ended(NamedTuple):
    """A run that must end well."""

    run: Path
    rows: list[dict[str, Any]]  # of its metrics
    outcome: Outcome


def end_of(directory: Path, **changes: Any) -> Ended:
    settings = {"env_steps": ENV_STEPS, "evaluation": {"every": 0}, "logging": {"every_seconds": 0.2}}
    cfg = synthetic.config(**settings | changes)
    run = runs.create(directory / "run", cfg)
    outcome = train(cfg, run, resume=False)
    assert outcome.counters.env_steps >= ENV_STEPS
    assert outcome.summary is not None
    return Ended(run, read_jsonl(run / METRICS), outcome)


def once(action: Callable[[], Any]) -> Callable[[], Any]:
    """`action` at the first call, nothing afterwards."""
    actions = [action]
    return lambda: actions.pop()() if actions else None


def fail(error: Exception) -> None:
    raise error


def spoil_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    step = synthetic.LineEnv.step
    steps = iter(range(10**9))

    def spoiled(env: synthetic.LineEnv, actions: Any) -> Any:
        outcome = step(env, actions)
        if env._seeds is None and next(steps) == 60:
            outcome.reward[0] = np.nan
        return outcome

    monkeypatch.setattr(synthetic.LineEnv, "step", spoiled)


def break_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    step = synthetic.LineEnv.step
    break_down = once(lambda: fail(RuntimeError("the simulator diverged")))

    def breaking(env: synthetic.LineEnv, actions: Any) -> Any:
        if env._seeds is None and env._length.max() > 30:
            break_down()
        return step(env, actions)

    monkeypatch.setattr(synthetic.LineEnv, "step", breaking)


def fill_the_disk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_manifest
    fill_up = once(lambda: fail(OSError(errno.ENOSPC, "No space left on device")))

    def full(*args: Any) -> None:
        fill_up()
        write(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", full)


def lose_the_device_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    update, save = Learner._update, Learner.save
    saved = threading.Event()
    break_down = once(lambda: fail(RuntimeError("the device is lost")))

    def failing(learner: Learner, batch: Any) -> None:
        if saved.is_set():
            break_down()
        update(learner, batch)

    def saving(learner: Learner, *args: Any) -> None:
        save(learner, *args)
        if learner._updates > 20:
            saved.set()

    monkeypatch.setattr(Learner, "_update", failing)
    monkeypatch.setattr(Learner, "save", saving)


@pytest.fixture(scope="module")
def unlucky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """A run in which four things go wrong, once each; a test for each says what came of it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        synthetic.use_line_task(monkeypatch)
        spoil_a_reward(monkeypatch)
        break_an_environment(monkeypatch)
        fill_the_disk_once(monkeypatch)
        lose_the_device_after_a_checkpoint(monkeypatch)
        yield end_of(
            tmp_path_factory.mktemp("unlucky"),
            actors={"count": 2, "envs": 8},
            checkpoint={"every_seconds": 0.5},
        )


def test_a_batch_that_is_not_finite_is_skipped_and_counted(unlucky):
    assert any(row.get("train/bad_in_row", 0) > 0 for row in unlucky.rows)
    assert unlucky.outcome.counters.updates > 0
    assert np.isfinite([row["eval/return"] for row in unlucky.rows if "eval/return" in row]).all()


def test_an_environment_that_raises_costs_its_actor_and_no_other(unlucky):
    recovered = {name for row in unlucky.rows for name in row if name.startswith("recovered/")}
    assert len(recovered & {"recovered/actor0", "recovered/actor1"}) == 1
    sources = {row["source"].partition("/")[0] for row in read_jsonl(unlucky.run / EPISODES)}
    assert sources == {"actor0", "actor1"}
    assert not any(row.get("replay/mixed") for row in unlucky.rows)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(unlucky):
    assert max(row.get("time/failed_saves", 0) for row in unlucky.rows) == 1
    newest = checkpoint.latest(unlucky.run / runs.CHECKPOINTS)
    assert newest is not None
    assert checkpoint.read_meta(newest)["env_steps"] == unlucky.outcome.counters.env_steps


def test_a_learner_that_fails_goes_on_from_its_checkpoint(unlucky):
    counters = unlucky.outcome.counters
    updates = [row["train/updates"] for row in unlucky.rows if "train/updates" in row]
    assert updates == sorted(updates)
    assert counters.updates > counters.lost_updates
    assert any("recovered/learner" in row for row in unlucky.rows)


def test_nothing_but_what_failed_was_started_anew(unlucky):
    assert unlucky.outcome.counters.restarts == 2  # an actor and the learner


def kill_a_reverb_server() -> None:
    servers = [p for p in psutil.Process().children() if "replay.process" in " ".join(p.cmdline())]
    os.kill(servers[0].pid, signal.SIGKILL)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("server", [pytest.param("reverb", marks=needs_reverb), "memory"])
def test_a_replay_that_fails_is_replaced_and_its_losses_are_counted(tmp_path, monkeypatch, server, shards):
    saved = runs.replay_dir(tmp_path / "run", 0, shards) / "000001" / "manifest.json"
    info, fail_once = ReplayInMemory.info, once(lambda: fail(RuntimeError("the table is broken")))

    def failing(replay: ReplayInMemory) -> Any:
        if saved.exists():
            fail_once()
        return info(replay)

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not saved.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        kill_a_reverb_server()

    if server == "memory":
        monkeypatch.setattr(ReplayInMemory, "info", failing)
    else:
        threading.Thread(target=kill, daemon=True).start()
    changes: dict[str, Any] = {"replay": {"server": server}}
    if shards == 2:
        changes["replay"] |= {"capacity": 20_000, "stride": 4, "shards": 2}
        changes["actors"] = {"count": 2, "envs": 8}
    _, rows, outcome = end_of(tmp_path, env_steps=15_000, checkpoint={"every_seconds": 0.5}, **changes)
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
