"""The control loop with parts whose answers the tests give."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from actors.rollout import RolloutReport
from common.types import EpisodeResult, UserError
from deploy import driver as driver_module
from deploy.outcome import exit_code
from deploy.signals import ENDING, Interrupted
from learner.learner import LearnerReport
from tests.deploy.fake_workers import (
    BATCH_STEPS,
    SLICE,
    FakeWorkers,
    config,
    drive,
    episode,
    evaluation,
    in_a_while,
    resumed_from,
    saved_meta,
)


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in ENDING]
    yield
    assert [signal.getsignal(number) for number in ENDING] == before


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """The tests may run under nohup, which has SIGHUP ignored, and the driver respects that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_run_counts_saves_and_evaluates_once_at_its_end(workers):
    outcome = drive(workers)
    assert outcome.counters.env_steps == sum(
        min(SLICE, args[1]) for name in ("actor0", "actor1") for args in workers.of(name, "run")
    )
    assert 300 <= outcome.counters.env_steps <= 300 + SLICE  # the other actor's slice in flight
    acted = sum(len(workers.of(name, "run")) for name in ("actor0", "actor1"))
    assert outcome.counters.agent_steps == 6 * acted
    assert outcome.counters.updates == workers.updates
    assert outcome.counters.replayed_steps == BATCH_STEPS * workers.updates
    ratio = outcome.counters.replayed_steps / (outcome.counters.agent_steps - 11)
    assert outcome.counters.train_ratio(11) == pytest.approx(ratio)
    assert exit_code(outcome) == 0

    assert workers.launched == [(0, 0, 6), (1, 0, 6)]  # 11 random steps, shared and rounded up
    assert workers.metrics_at == [None]
    assert evaluations(workers) == [4]
    assert outcome.summary is not None
    assert outcome.summary["eval/return"] == 5.0
    order = [(part, method) for part, method, _ in workers.calls]
    tail = [
        ("learner", "save"),
        ("replay", "checkpoint"),
        ("learner", "publish"),  # the final parameters are those that are judged
        ("evaluator", "evaluate"),
        ("metrics", "evaluation"),
        ("metrics", "close"),
    ]
    assert [call for call in order if call in tail] == tail
    assert order.index(("actor0", "finish")) < order.index(("learner", "save"))
    assert saved_meta(workers)["env_steps"] == outcome.counters.env_steps
    rows = workers.of("metrics", "write")
    assert rows[0] == (0, {"time/compile_seconds": 0.5})
    assert rows[-1][0] == outcome.counters.env_steps
    assert rows[-1][1]["replay/train_ratio"] == pytest.approx(ratio)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_actors_are_asked_for_no_more_than_what_is_left(workers):
    drive(workers, config(env_steps=100, actors={"count": 1, "slice_seconds": 0.01}))
    assert [args[:2] for args in workers.of("actor0", "run")] == [(0.01, n) for n in (100, 70, 40, 10)]


def test_actors_share_what_is_left(workers):
    drive(workers, config(env_steps=100))
    assert workers.of("actor0", "run")[0][:2] == workers.of("actor1", "run")[0][:2] == (0.01, 50)
    assert min(share for part, method, (_, share, _) in runs_of_actors(workers)) >= 1


def runs_of_actors(workers: FakeWorkers) -> list[tuple[str, str, tuple]]:
    return [call for call in workers.calls if call[0].startswith("actor") and call[1] == "run"]


def test_evaluations_follow_the_env_steps_and_start_at_zero(workers):
    one = {"count": 1, "slice_seconds": 0.01}
    drive(workers, config(actors=one, evaluation={"every": 100, "episodes": 3, "final_episodes": 4}))
    assert evaluations(workers) == [3, 3, 3, 4]
    at = [env_steps for env_steps, _ in workers.of("metrics", "evaluation")]
    assert at == [0, 120, 210, 300]  # the first slice that ends beyond 100 and 200


def test_an_evaluation_is_played_in_slices_to_its_end(workers):
    slices = iter([None, None, evaluation(0.01, 3), None, evaluation(0.01, 4)])
    workers.on["evaluator", "evaluate"] = lambda *args: in_a_while(next(slices), 0.01)
    workers.on["actor", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=5, agent_steps=1), 0.02)
    outcome = drive(workers, config(evaluation={"every": 10**6, "episodes": 3, "final_episodes": 4}))
    assert evaluations(workers) == [3, 3, 3, 4, 4]
    at = [env_steps for env_steps, _ in workers.of("metrics", "evaluation")]
    assert at == [0, outcome.counters.env_steps]


def evaluations(workers: FakeWorkers) -> list[int]:
    """Numbers of episodes that the evaluator was asked for."""
    return [episodes for _, episodes in workers.of("evaluator", "evaluate")]


def test_there_is_one_evaluation_at_a_time(workers):
    running: list[Future[Any]] = []

    def evaluate(seconds: float, episodes: int) -> Future[Any]:
        assert all(future.done() for future in running)
        running.append(in_a_while(evaluation(seconds, episodes), 0.05))
        return running[-1]

    workers.on["evaluator", "evaluate"] = evaluate
    drive(workers, config(env_steps=1500, evaluation={"every": 30, "episodes": 3, "final_episodes": 4}))
    assert 2 <= len(running) < 1500 // 30  # some were skipped, not queued up


def test_checkpoints_are_written_at_their_interval_one_at_a_time(workers):
    saving: list[Future[Any]] = []

    def slow(*args: Any) -> Future[Any]:
        assert all(future.done() for future in saving)
        saving.append(in_a_while(None, 0.02))
        return saving[-1]

    workers.on["learner", "save"] = workers.on["replay", "checkpoint"] = slow
    started = time.monotonic()
    drive(workers, config(env_steps=6000, checkpoint={"every_seconds": 0.1, "keep": 3}))
    saves = len(workers.of("learner", "save"))
    assert 2 <= saves <= 2 + (time.monotonic() - started) / 0.1
    assert len(workers.of("replay", "checkpoint")) == saves
    metas = [args[0] for args in workers.of("learner", "save")]
    assert [meta["env_steps"] for meta in metas] == sorted({meta["env_steps"] for meta in metas})
    assert metas[0]["counters"]["env_steps"] == metas[0]["env_steps"]
    assert metas[0]["config"]["env_steps"] == 6000


def test_replay_is_saved_only_where_it_shall_be(workers):
    drive(workers, config(replay={"checkpoint": False}))
    assert workers.of("learner", "save")
    assert not workers.of("replay", "checkpoint")


def test_a_failing_actor_is_started_anew_and_the_others_go_on(workers):
    failures = iter([RuntimeError("the simulator broke")] * 2)

    def run(seconds: float, share: int, newest: int) -> RolloutReport:
        for error in failures:
            raise error
        return workers.actor_run(seconds, share, newest)

    workers.on["actor1", "run"] = run
    outcome = drive(workers, config(env_steps=3_000))
    assert outcome.counters.restarts == 2
    assert [index for index, _, _ in workers.launched] == [0, 1, 1, 1]
    lives = [life for index, life, _ in workers.launched if index == 1]
    assert len(set(lives)) == 3  # never the same layouts again
    assert [prefill for *_, prefill in workers.launched] == [6, 6, 0, 0]
    assert len(workers.of("actor0", "run")) > 2
    assert outcome.summary is not None


def test_an_actor_that_fails_again_and_again_ends_the_run_with_a_checkpoint(workers):
    workers.on["actor1", "start"] = lambda: in_a_while(RuntimeError("no such\n  camera"), 0.01)
    workers.on["actor0", "run"] = lambda *args: in_a_while(RolloutReport(env_steps=1), 0.01)
    with pytest.raises(UserError, match="actor 1 failed 4 times in a row: no such camera"):
        drive(workers)
    assert len(workers.of("actor1", "start")) == 4
    assert workers.of("learner", "save")
    assert workers.of("replay", "checkpoint")
    assert workers.of("metrics", "close")


def test_failures_count_in_a_row_only(workers):
    calls = iter(range(1000))

    def run(seconds: float, share: int, newest: int) -> RolloutReport:
        if next(calls) % 2:
            raise RuntimeError("every other time")
        return workers.actor_run(seconds, share, newest)

    workers.on["actor1", "run"] = run
    assert drive(workers, config(env_steps=5_000)).counters.restarts > 4


def test_an_actor_that_fails_at_the_end_ends_nothing(workers):
    def finish() -> None:
        raise RuntimeError("too late")

    workers.on["actor1", "finish"] = finish
    outcome = drive(workers)
    assert outcome.summary is not None
    assert outcome.counters.restarts == 0


@pytest.mark.parametrize("save_fails", [False, True])
def test_a_learner_error_ends_the_run_after_an_attempt_to_save(workers, save_fails):
    def broken(*args: Any) -> None:
        raise UserError("training stopped: not finite")

    workers.on["learner", "run"] = broken
    if save_fails:
        workers.on["learner", "save"] = lambda meta: in_a_while(OSError("disk full"), 0.01)
    with pytest.raises(UserError, match="not finite"):
        drive(workers)
    assert len(workers.of("learner", "save")) == 1
    assert len(workers.of("replay", "checkpoint")) == (not save_fails)
    assert not workers.of("evaluator", "evaluate")


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_saves_and_ends_the_run(workers, number):
    def run(seconds: float, share: int, newest: int) -> RolloutReport:
        if len(workers.of("actor0", "run")) == 3:
            os.kill(os.getpid(), number)
        return workers.actor_run(seconds, share, newest)

    workers.on["actor0", "run"] = run
    outcome = drive(workers, config(env_steps=10**6))
    assert outcome.signal == number
    assert exit_code(outcome) == 128 + number
    assert outcome.summary is None
    assert saved_meta(workers)["env_steps"] == outcome.counters.env_steps
    assert outcome.counters.env_steps < 10**4
    assert workers.of("replay", "checkpoint")
    assert len(workers.of("actor1", "finish")) == 1
    assert not workers.of("evaluator", "evaluate")
    assert workers.of("metrics", "close")


def test_the_same_signal_twice_at_once_is_one_wish(workers):
    def run(seconds: float, share: int, newest: int) -> RolloutReport:
        for _ in range(2):  # `timeout` signals its child, then the child's group
            os.kill(os.getpid(), signal.SIGTERM)
        return workers.actor_run(seconds, share, newest)

    workers.on["actor0", "run"] = run
    assert drive(workers).signal == signal.SIGTERM
    assert workers.of("learner", "save")


@pytest.mark.parametrize("seconds", [0.0, 0.3])  # before the loop has seen the first, and while it ends
def test_a_second_signal_leaves_without_saving(workers, monkeypatch, seconds):
    monkeypatch.setattr("deploy.signals._ONE_WISH_SECONDS", 0.0)
    me = os.getpid()

    def run(seconds_: float, share: int, newest: int) -> Future[Any]:
        os.kill(me, signal.SIGINT)
        if seconds:
            threading.Timer(seconds, os.kill, [me, signal.SIGTERM]).start()
        else:
            os.kill(me, signal.SIGTERM)
        return Future()

    workers.on["actor0", "run"] = run
    with pytest.raises(Interrupted) as leaving:
        drive(workers)
    assert leaving.value.number == signal.SIGTERM
    assert not workers.of("learner", "save")


def test_a_signal_while_the_learner_compiles_leaves_at_once(workers):
    def start(resume: bool) -> Future[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return Future()

    workers.on["learner", "start"] = start
    with pytest.raises(Interrupted):
        drive(workers)
    assert workers.calls == [("replay", "start", ()), ("learner", "start", (False,))]


def test_a_part_that_hangs_at_the_end_is_left_behind(workers, monkeypatch):
    monkeypatch.setattr(driver_module, "_SLICE_END_SECONDS", 0.2)
    workers.on["actor1", "run"] = lambda *args: Future()
    outcome = drive(workers)
    assert outcome.counters.env_steps >= 300
    assert outcome.summary is not None


def test_resuming_continues_the_counters(workers):
    first = drive(workers, config(evaluation={"every": 100, "episodes": 3, "final_episodes": 4}))
    again = FakeWorkers()
    again.updates = 7
    again.on["learner", "start"] = resumed_from(saved_meta(workers))
    cfg = config(env_steps=600, evaluation={"every": 100, "episodes": 3, "final_episodes": 4})
    outcome = drive(again, cfg, resume=True)

    start = first.counters.env_steps
    assert again.metrics_at == [start]
    assert again.of("learner", "start") == [(True,)]
    # New layouts and no random steps: the buffer is there already.
    assert again.launched == [(0, start, 0), (1, start, 0)]
    assert 600 <= outcome.counters.env_steps <= 600 + SLICE
    assert outcome.counters.wall_seconds > first.counters.wall_seconds
    # The learner's own count of updates holds, whatever the driver knew when it saved.
    assert outcome.counters.replayed_steps == BATCH_STEPS * again.updates
    assert outcome.counters.updates == again.updates
    at = [env_steps for env_steps, _ in again.of("metrics", "evaluation")]
    assert at[0] > start  # the final evaluation of the first part stands for that env step
    assert at[-1] == outcome.counters.env_steps


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for_at_the_resume(workers):
    def run(seconds: float, share: int, newest: int) -> RolloutReport:
        if workers.of("evaluator", "evaluate"):
            os.kill(os.getpid(), signal.SIGTERM)
        return workers.actor_run(seconds, share, newest)

    workers.on["actor0", "run"] = run
    workers.on["evaluator", "evaluate"] = lambda seconds, episodes: Future()
    cfg = config(env_steps=10**6, evaluation={"every": 10**5, "episodes": 3, "final_episodes": 4})
    drive(workers, cfg)
    again = FakeWorkers()
    again.on["learner", "start"] = resumed_from(saved_meta(workers))
    drive(again, dataclasses.replace(cfg, env_steps=saved_meta(workers)["env_steps"] + 500), resume=True)
    assert evaluations(again) == [3, 4]


def test_resuming_without_a_checkpoint_starts_anew(workers):
    outcome = drive(workers, resume=True)
    assert workers.metrics_at == [-1]  # rows of the lost beginning go
    assert workers.launched == [(0, 0, 6), (1, 0, 6)]
    assert outcome.counters.env_steps >= 300


def test_a_finished_run_is_not_resumed(workers):
    drive(workers)
    again = FakeWorkers()
    again.on["learner", "start"] = resumed_from(saved_meta(workers))
    with pytest.raises(UserError, match=r"already has 3\d\d env steps.*--env-steps"):
        drive(again, resume=True)
    assert not again.launched


def test_skipped_checkpoints_are_told(workers, caplog):
    drive(workers)
    again = FakeWorkers()
    restored = resumed_from(saved_meta(workers))(True)
    again.on["learner", "start"] = lambda resume: dataclasses.replace(restored, warnings=["x is damaged"])
    drive(again, config(env_steps=600), resume=True)
    assert "checkpoint passed over: x is damaged" in caplog.text


@pytest.mark.parametrize("interrupted", [False, True])
def test_every_episode_reaches_learner_and_metrics_exactly_once(workers, interrupted):
    """Also those of the slices that are still in flight when the run ends."""
    sent: list[EpisodeResult] = []

    def run(seconds: float, share: int, newest: int) -> Future[Any]:
        if interrupted and len(sent) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        episodes = [episode(len(sent)), episode(len(sent) + 1)]
        sent.extend(episodes)
        report = RolloutReport(env_steps=SLICE, agent_steps=6, seconds=0.01, episodes=episodes)
        return in_a_while(report, 0.01 + 0.05 * (len(sent) % 3))

    workers.on["actor", "run"] = run
    workers.on["learner", "run"] = lambda seconds, episodes, env_steps: in_a_while(LearnerReport(1), 0.07)
    outcome = drive(workers, config(env_steps=10**6 if interrupted else 900))
    assert outcome.counters.env_steps == SLICE * len(sent) // 2
    seen = [e for _, episodes, _ in workers.of("learner", "run") for e in episodes]
    assert sorted(e.return_ for e in seen) == [e.return_ for e in sent]
    written = [result for _, result in workers.of("metrics", "episode")]
    assert sorted(e.return_ for e in written) == [e.return_ for e in sent]
    order = [method for part, method, _ in workers.calls if part == "learner"]
    assert order.index("save") > len(order) - 3  # all of them before the state is saved
