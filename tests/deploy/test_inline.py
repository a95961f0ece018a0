"""Whole runs in this process, on a task that a tiny agent learns in seconds."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common import checkpoint
from common.config import Config
from common.configuration import merge
from common.metrics import EPISODES, METRICS
from common.sinks import read_jsonl
from common.types import UserError, replay_spec
from deploy import run_dir as runs
from deploy import wiring
from deploy.inline import ThreadProxy
from deploy.outcome import Counters
from deploy.train import train
from replay.table import table_spec
from tests import synthetic
from tests.synthetic import COST_LIMIT, GOOD_RETURN

UNCONSTRAINED = {"safety": {"cost_model": "none", "constraint": "none"}}


@pytest.fixture(autouse=True)
def line_task(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.use_line_task(monkeypatch)


def run_of(tmp_path: Path, **changes: Any) -> tuple[Path, Any]:
    cfg = synthetic.config(**changes)
    run = runs.create(tmp_path / "run", cfg)
    return run, train(cfg, run, resume=False)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run / METRICS) if "eval/return" in row]


@pytest.mark.parametrize(
    ("seed", "inference", "precision"),
    [(0, "local", "float32"), (1, "local", "float32"), (2, "server", "float32"), (0, "local", "bfloat16")],
)
def test_the_pid_agent_learns_and_keeps_the_limit(tmp_path, seed, inference, precision, caplog):
    run, outcome = run_of(
        tmp_path,
        env_steps=16_000,
        seed=seed,
        inference={"mode": inference},
        learner={"precision": precision},
    )
    assert any("inference/batch" in row for row in read_jsonl(run / METRICS)) == (inference == "server")
    assert ("bfloat16 is slow on a cpu" in caplog.text) == (precision == "bfloat16")
    assert outcome.signal is None
    untrained, before, *_, last = evaluations(run)
    assert untrained["env_steps"] == 0
    assert before["eval/cost"] > 3 * COST_LIMIT  # without pressure it went to the target
    assert last["eval/cost"] < COST_LIMIT
    assert last["eval/return"] > GOOD_RETURN
    assert last["eval/return"] == outcome.summary["eval/return"]
    assert last["model/openloop_error/8"] < untrained["model/openloop_error/8"]


def test_the_augmented_agent_keeps_the_limit(tmp_path):
    augmented = {"multiplier": 0.0, "penalty": 2e-3, "growth": 0.0, "cap": 0.25}
    safety = {"constraint": "augmented", "cost_limit": 0.5, "augmented": augmented}
    _, outcome = run_of(tmp_path, safety=safety)
    assert outcome.summary["eval/cost"] < COST_LIMIT
    assert outcome.summary["eval/return"] > GOOD_RETURN


def test_without_a_constraint_the_limit_is_violated(tmp_path):
    _, outcome = run_of(tmp_path, env_steps=6_000, **UNCONSTRAINED)
    assert outcome.summary["eval/cost"] > 3 * COST_LIMIT
    assert outcome.summary["eval/return"] > GOOD_RETURN


def limiter_slack(cfg: Config) -> float:
    """Replayed steps by which learning may run ahead of acting or fall behind, on however slow a machine.

    The width of the rate limiter's window, and the first window that every new stream has to fill.
    """
    spec, streams = wiring.spec_of(cfg), cfg.actors.count * cfg.actors.envs
    table = table_spec(
        replay_spec(spec),
        cfg.replay,
        batch_length=cfg.learner.batch_length,
        train_ratio=cfg.learner.train_ratio,
        batch_size=cfg.learner.batch_size,
        min_steps=cfg.learner.prefill,
        streams=streams,
    )
    low, high = table.error_range
    return (high - low + streams * table.samples_per_insert) * cfg.learner.batch_length


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Counters]:
    """A run that has ended, how it was configured, and what it counted."""
    cfg = synthetic.config(
        env_steps=4_000,
        logging={"every_seconds": 0.2},
        evaluation={"every": 1_500, "episodes": 2, "final_episodes": 2},
    )
    run = runs.create(tmp_path_factory.mktemp("finished") / "run", cfg)
    with pytest.MonkeyPatch.context() as monkeypatch:
        synthetic.use_line_task(monkeypatch)
        return run, cfg, train(cfg, run, resume=False).counters


def test_a_replay_buffer_of_another_definition_is_refused(finished):
    """Whoever edits a run's configuration by hand hears of it before anything starts."""
    run, cfg, _ = finished
    other = merge(cfg, {"env_steps": 5_000, "replay": {"capacity": 10_000}}, "test")
    with pytest.raises(UserError, match=r"another max_size .*keep replay\.capacity as it was"):
        train(other, run, resume=True)


def test_a_resumed_run_continues_its_curve_and_its_replay(finished):
    run, cfg, first = finished
    rows = read_jsonl(run / METRICS)

    cfg = merge(cfg, {"env_steps": 5_000}, "test")
    second = train(cfg, run, resume=True).counters
    assert 5_000 <= second.env_steps <= 5_000 + 16 * 2
    assert runs.read_config(run) == wiring.settled(cfg)

    continued = read_jsonl(run / METRICS)
    assert continued[: len(rows)] == rows
    new = [row["env_steps"] for row in continued[len(rows) :] if "eval/return" not in row]
    assert new == sorted(new)
    assert first.env_steps <= new[0]
    at = [row["env_steps"] for row in evaluations(run)]
    assert at == sorted(set(at))  # none twice, also not the one at the seam
    episodes = [row["env_steps"] for row in read_jsonl(run / EPISODES)]
    assert episodes == sorted(episodes)
    walls = [row["wall_seconds"] for row in continued]
    assert walls == sorted(walls)

    # 500 more agent steps are less than the prefill: only a restored buffer lets learning go on.
    replayed = second.replayed_steps - first.replayed_steps
    collected = second.agent_steps - first.agent_steps
    assert collected < cfg.learner.prefill
    assert second.updates > first.updates
    assert replayed == pytest.approx(16 * collected, abs=limiter_slack(cfg))
    assert second.train_ratio(800) == pytest.approx(16, rel=0.1)
    newest = checkpoint.latest(run / runs.CHECKPOINTS)
    assert newest is not None
    assert checkpoint.read_meta(newest)["updates"] == second.updates


def test_sigint_saves_and_the_run_can_go_on(tmp_path):
    cfg = synthetic.config(env_steps=10**6, evaluation={"every": 0})
    run = runs.create(tmp_path / "run", cfg)

    def interrupt_when_learning() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(row.get("train/updates", 0) > 10 for row in read_jsonl(run / METRICS)):
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_learning, daemon=True).start()
    outcome = train(cfg, run, resume=False)
    assert outcome.signal == signal.SIGINT
    assert outcome.summary is None
    newest = checkpoint.latest(run / runs.CHECKPOINTS)
    assert newest is not None
    meta = checkpoint.read_meta(newest)
    assert meta["env_steps"] == outcome.counters.env_steps
    assert meta["updates"] == outcome.counters.updates > 10
    assert (run / runs.PLOT).is_file()


# --- the threads --------------------------------------------------------------------------------


class Worker:
    def __init__(self) -> None:
        self.thread = threading.current_thread().name
        self.log: list[str] = []
        self._stopped = threading.Event()

    def work(self, seconds: float) -> str:
        assert threading.current_thread().name == self.thread
        self._stopped.wait(seconds)
        self.log.append("work")
        return "done"

    def fail(self) -> None:
        raise UserError("no such thing")

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.log.append("close")


def test_a_thread_proxy_makes_its_object_and_calls_it_in_one_thread_in_order():
    proxy = ThreadProxy("part", Worker)
    first, second = proxy.call("work", 0.05), proxy.call("work", 0.0)
    assert second.result(5) == "done"
    assert first.done()
    with pytest.raises(UserError, match="no such thing"):
        proxy.call("fail").result(5)
    assert proxy.call("work", 0.0).result(5) == "done"  # an error ends nothing
    proxy.close()


def test_closing_a_thread_proxy_cuts_a_long_call_short_and_closes_after_it():
    worker = Worker.__new__(Worker)
    proxy = ThreadProxy("part", lambda: worker.__init__() or worker)
    call = proxy.call("work", 60.0)
    started = time.monotonic()
    proxy.close()
    assert time.monotonic() - started < 5
    assert call.result(0) == "done"
    assert worker.log == ["work", "close"]


def test_an_object_that_cannot_be_made_fails_every_call_and_closes_well():
    def make() -> None:
        raise UserError("the port is taken")

    proxy = ThreadProxy("part", make)
    for _ in range(2):
        with pytest.raises(UserError, match="the port is taken"):
            proxy.call("work").result(5)
    proxy.close()
