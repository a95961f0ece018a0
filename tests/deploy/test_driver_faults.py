"""What the control loop makes of parts that fail: who goes on, what is counted, what is done again."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import Future
from typing import Any

import pytest

from actors.inference_server import InferenceReport
from actors.rollout import RolloutReport
from common.types import EpisodeResult, UserError
from deploy import driver
from deploy.workers import Started
from learner.learner import LearnerReport
from replay.table import ReplayInfo
from tests.deploy.fake_workers import (
    BATCH_STEPS,
    FakeWorkers,
    config,
    drive,
    episode,
    evaluation,
    in_a_while,
)

DIED = "its process has ended"


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


def at_call(number: int, error: Exception, otherwise: Any) -> Any:
    """A behaviour that fails once, at that call."""
    calls = itertools.count(1)

    def behave(*args: Any) -> Any:
        if next(calls) == number:
            raise error
        return otherwise(*args)

    return behave


def test_a_learner_that_died_forgets_updates_and_the_run_does_not(workers):
    remembered = 3

    def start(resume: bool) -> Started:
        if not resume:
            return Started(None, 0.5, "cpu")
        workers.updates = remembered
        return Started({"updates": remembered, "counters": {}}, 0.5, "cpu")

    workers.on["learner", "start"] = start
    workers.on["learner", "run"] = at_call(12, RuntimeError(DIED), workers.learner_run)
    outcome = drive(workers, config(env_steps=2_000))
    counters = outcome.counters
    assert counters.restarts == 1
    assert counters.lost_updates == 11 - remembered
    assert counters.updates == workers.updates + counters.lost_updates
    assert counters.replayed_steps == BATCH_STEPS * counters.updates
    rows = [row for _, row in workers.of("metrics", "write") if "train/updates" in row]
    updates = [row["train/updates"] for row in rows]
    assert updates == sorted(updates)
    assert rows[-1]["train/lost_updates"] == counters.lost_updates
    assert any("recovered/learner" in row for row in rows)


def test_episodes_that_a_dead_learner_was_shown_are_shown_to_the_next(workers):
    sent: list[EpisodeResult] = []
    kept: list[EpisodeResult] = []

    def act(seconds: float, share: int, newest: int) -> RolloutReport:
        sent.append(episode(len(sent)))
        report = workers.actor_run(seconds, share, newest)
        return dataclasses.replace(report, episodes=sent[-1:])

    def learn(seconds: float, episodes: list[EpisodeResult], env_steps: int) -> LearnerReport:
        kept.extend(episodes)
        return workers.learner_run(seconds, episodes, env_steps)

    workers.on["actor", "run"] = act
    workers.on["learner", "run"] = at_call(5, RuntimeError(DIED), learn)
    drive(workers, config(env_steps=2_000))
    assert sorted(e.return_ for e in kept) == [e.return_ for e in sent]


def test_a_replay_server_that_died_is_restarted_and_its_losses_counted(workers):
    traffic = itertools.count()
    looks = at_call(2, RuntimeError(DIED), lambda: ReplayInfo(10, next(traffic), 0))
    workers.on["replay", "info"] = looks
    workers.on["actor", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=5, agent_steps=1), 0.02)
    outcome = drive(workers, config(env_steps=1_500))
    assert len(workers.of("replay", "start")) == 2
    assert 0 < outcome.counters.lost_steps < outcome.counters.agent_steps


def test_an_evaluator_that_died_plays_the_evaluation_again(workers):
    workers.on["evaluator", "evaluate"] = at_call(1, RuntimeError(DIED), evaluation)
    outcome = drive(
        workers, config(env_steps=3_000, evaluation={"every": 2_000, "episodes": 3, "final_episodes": 4})
    )
    assert outcome.counters.restarts == 1
    assert [episodes for _, episodes in workers.of("evaluator", "evaluate")[:2]] == [3, 3]
    at = [env_steps for env_steps, _ in workers.of("metrics", "evaluation")]
    assert len(at) == 3
    assert at == sorted(at)


@pytest.mark.parametrize("part", ["learner", "replay"])
def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(workers, part, caplog):
    method = {"learner": "save", "replay": "checkpoint"}[part]
    workers.on[part, method] = at_call(1, UserError("no space left"), lambda *args: None)
    cfg = config(env_steps=6_000, checkpoint={"every_seconds": 0.1, "keep": 3})
    outcome = drive(workers, cfg)
    assert outcome.counters.restarts == 0
    assert len(workers.of(part, method)) > 2
    assert "goes on without a checkpoint" in caplog.text
    rows = [row for _, row in workers.of("metrics", "write")]
    assert rows[-1]["time/failed_saves"] == 1


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ("learner", "save"),
        ("replay", "checkpoint"),
        ("learner", "publish"),
        ("evaluator", "evaluate"),
        ("metrics", "close"),
    ],
)
def test_a_part_that_dies_while_the_run_ends_is_asked_again(workers, part, method):
    default = evaluation if method == "evaluate" else lambda *args: None
    workers.on[part, method] = at_call(1, RuntimeError(DIED), default)
    outcome = drive(workers)
    assert len(workers.of(part, method)) == 2
    assert outcome.summary is not None
    assert outcome.counters.restarts == 1


def test_an_evaluator_that_hangs_is_replaced_and_plays_the_evaluation_again(workers):
    answers = itertools.count(1)

    def evaluate(*args: Any) -> Any:
        return Future() if next(answers) == 1 else evaluation(*args)

    workers.on["evaluator", "evaluate"] = evaluate
    workers.on["actor", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=5, agent_steps=1), 0.02)
    workers.on["learner", "run"] = lambda *args: in_a_while(LearnerReport(1, 8), 0.02)
    supervision = {"grace_seconds": 2.0, "backoff_seconds": 0.1, "max_failures": 3}
    outcome = drive(
        workers,
        config(
            env_steps=1_500,
            supervision=supervision,
            evaluation={"every": 10**6, "episodes": 3, "final_episodes": 4},
        ),
    )
    assert outcome.counters.restarts == 1
    assert len(workers.of("metrics", "evaluation")) == 2


def test_a_part_that_is_silent_is_replaced_and_shown_as_down(workers):
    answers = itertools.count(1)

    def run(seconds: float, share: int, newest: int) -> Any:
        return Future() if next(answers) == 3 else workers.actor_run(seconds, share, newest)

    workers.on["actor1", "run"] = run
    workers.on["actor0", "run"] = lambda *args: in_a_while(RolloutReport(), 0.05)  # does not end the run
    supervision = {"grace_seconds": 1.0, "backoff_seconds": 0.2, "max_failures": 3}
    outcome = drive(workers, config(env_steps=5_000, supervision=supervision))
    assert outcome.counters.restarts >= 1
    rows = [row for _, row in workers.of("metrics", "write")]
    assert any(row.get("down/actor1", 0) > 0 for row in rows)
    assert any(row.get("recovered/actor1", 0) >= 0.2 for row in rows)


@pytest.mark.parametrize("part", ["learner", "replay", "evaluator"])
def test_a_crash_loop_of_any_part_ends_the_run(workers, part):
    def die(*args: Any) -> None:
        raise RuntimeError(f"{part} is broken")

    method = {"learner": "run", "replay": "info", "evaluator": "evaluate"}[part]
    workers.on[part, method] = die
    workers.on["actor", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=5, agent_steps=1), 0.02)
    with pytest.raises(UserError, match=f"{part} failed 4 times in a row: {part} is broken"):
        drive(workers, config(env_steps=10**6, evaluation={"every": 10, "episodes": 1, "final_episodes": 1}))


def test_a_failed_inference_server_is_replaced_and_what_it_reports_is_logged(workers, monkeypatch):
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.02)
    workers.central = True
    answers = iter(range(1000))

    def report() -> Any:
        if next(answers) == 1:
            return RuntimeError("out of memory")
        return InferenceReport(1, 3, {"inference/batch": 4})

    workers.on["inference", "report"] = lambda: in_a_while(report(), 0.01)
    workers.on["actor", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=5, agent_steps=1), 0.02)
    outcome = drive(workers, config(env_steps=1_500))
    assert outcome.counters.restarts == 1
    assert len(workers.of("inference", "start")) == 2
    assert any(row.get("inference/batch") == 4 for _, row in workers.of("metrics", "write"))


def test_actors_are_told_the_newest_version(workers):
    workers.on["learner", "run"] = lambda *args: in_a_while(LearnerReport(1, 8, 0.01, 0.0, 42), 0.01)
    workers.on["actor", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=5, agent_steps=1), 0.02)
    drive(workers)
    assert {newest for _, _, newest in workers.of("actor0", "run")} == {0, 42}


def test_one_of_two_replay_servers_dies_and_only_its_own_steps_are_lost(workers):
    traffic = itertools.count()
    looks = at_call(4, RuntimeError(DIED), lambda: ReplayInfo(10, next(traffic), 0))
    workers.on["replay1", "info"] = looks
    for name, steps in {"actor0": 100, "actor1": 1}.items():
        result = RolloutReport(env_steps=5, agent_steps=steps)
        workers.on[name, "run"] = lambda *args, result=result: in_a_while(result, 0.02)
    outcome = drive(workers, config(env_steps=1_500, replay={"shards": 2}))
    assert [len(workers.of(name, "start")) for name in ("replay", "replay1")] == [1, 2]
    assert outcome.counters.restarts == 1
    assert 0 < outcome.counters.lost_steps <= 150  # none of actor 0's 100 at a time
    assert len(workers.of("replay", "checkpoint")) == len(workers.of("replay1", "checkpoint")) == 1
    sizes = [row["replay/size"] for _, row in workers.of("metrics", "write") if "replay/size" in row]
    assert 20 in sizes  # of both together
