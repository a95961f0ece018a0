"""The control loop of a run: hands out slices of work, counts, evaluates, saves, and ends cleanly.

It is the same for every way to run: `Workers` says where the parts live (threads, Ray), and
`deploy.supervision` keeps them at work.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from actors.inference_server import InferenceReport
from actors.rollout import RolloutReport
from common.config import Config
from common.configuration import to_dict
from common.metrics import Aggregator, cut_back, summarize_episodes
from common.status import Evaluation, Status
from common.types import EnvSpec, EpisodeResult, UserError
from common.versions import Stretch, as_json
from deploy import signals
from deploy.evaluations import Evaluations
from deploy.journal import Journal
from deploy.outcome import Counters, Outcome
from deploy.saving import SAVE_REPLAY_SECONDS, SAVE_SECONDS, Saver
from deploy.signals import StopWish
from deploy.supervision import (
    EVALUATOR,
    INFERENCE,
    LEARNER,
    METRICS,
    TICK_SECONDS,
    Proxy,
    Supervisor,
    first_words,
)
from deploy.workers import EvaluationReport, Started
from learner.learner import LearnerReport
from replay.table import ReplayInfo

logger = logging.getLogger(__name__)

_RATE_SECONDS = 15.0  # window of the rates that are shown
_SLICE_END_SECONDS = 30.0  # longest wait for the slices in flight when a run ends
_LOOK_SECONDS = 1.0  # between two looks at servers, which the driver asks for nothing else


class Workers(Protocol):
    """Where the parts of a run live. Each method starts its part; what is left of an earlier one goes."""

    watched: bool  # whether a part that hangs can be ended and replaced
    central: bool  # whether one server decides for all actors

    def replay(self, shard: int) -> Proxy: ...

    def learner(self) -> Proxy: ...

    def inference(self) -> Proxy: ...

    def evaluator(self) -> Proxy: ...

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> Proxy: ...

    def actor(self, index: int, life: int, prefill: int) -> Proxy: ...

    def close(self) -> None:
        """Ends every part; what must not be lost was saved before."""
        ...


class Driver:
    """Runs one training to its end. `run` blocks; signals end it with a checkpoint.

    `made_with` says what it has trained on until now and does from here on; checkpoints keep it.
    """

    def __init__(
        self,
        cfg: Config,
        spec: EnvSpec,
        run: Path,
        workers: Workers,
        status: Status,
        made_with: Sequence[Stretch],
    ):
        self._cfg, self._spec, self._run_dir, self._workers = cfg, spec, run, workers
        self._status, self._made_with = status, made_with
        self._counters = Counters()
        self._parts = Supervisor(cfg.supervision, self._failed, workers.watched)
        self._rows = Aggregator()
        self._episodes: list[EpisodeResult] = []  # finished, not yet seen by the learner
        self._shown: list[EpisodeResult] = []  # to the learner, in the slice in flight
        self._actors = {actor_name(index): index for index in range(cfg.actors.count)}
        # Actor i writes to the replay server i modulo their number.
        self._replays = replay_names(cfg.replay.shards)
        self._prefill = 0  # random agent steps of an actor in its first life
        self._lives: dict[int, int] = {}
        self._marks: deque[tuple[float, int, int]] = deque()
        self._acting = False
        self._learning = False
        self._wish = StopWish(self._stop_is_wished)
        self._evaluations = Evaluations(cfg, self._parts, self._told_to_stop, self._evaluated)
        self._summary: dict[str, float] | None = None  # of the newest evaluation
        self._resume = False  # how a learner starts
        self._started: Started | None = None
        self._replays_ready: set[str] = set()
        self._replay_infos: dict[str, ReplayInfo] = {}  # at the last look
        every, self._saved_replays = cfg.checkpoint.every_seconds, self._replays * cfg.replay.checkpoint
        self._saver = Saver(self._parts, every, self._saved_replays, self._meta, self._not_saved)
        self._journal: Journal | None = None
        self._version = 0
        self._clock = self._looked_at = time.monotonic()

    def run(self, resume: bool) -> Outcome:
        """Trains until `env_steps`, SIGINT or SIGTERM.

        Raises:
            UserError: training cannot start or go on (what was trained is saved first if it can be).
        """
        with signals.handled(self._wish.hear):
            self._start(resume)
            try:
                self._loop()
            except BaseException:
                self._acting = self._learning = False
                self._save_what_can_be_saved()
                raise
            summary = self._finish()
        return Outcome(self._counters, self._wish.signal, summary)

    # --- start ------------------------------------------------------------------------------------

    def _start(self, resume: bool) -> None:
        self._status.phase = "compiling"
        self._resume = resume
        for shard, name in enumerate(self._replays):
            make = partial(self._workers.replay, shard)
            self._parts.launch(name, make, partial(self._begin_replay, name))
        self._await(lambda: len(self._replays_ready) == len(self._replays))
        self._parts.launch(LEARNER, self._workers.learner, self._begin_learner)
        self._parts.launch(EVALUATOR, self._workers.evaluator, self._begin_evaluator)
        self._await(lambda: self._started is not None)
        started = self._started
        assert started is not None
        self._take_over(started, resume)
        self._prefill = 0 if started.meta else math.ceil(self._random_steps(started) / self._cfg.actors.count)
        resumed_at = self._counters.env_steps if started.meta is not None else -1
        settings = to_dict(self._cfg)
        make_metrics = lambda at: self._workers.metrics(settings, at)  # noqa: E731
        journal = self._journal = Journal(self._parts, make_metrics, resumed_at if resume else None)
        self._record("write", {"time/compile_seconds": started.compile_seconds})
        self._await(lambda: journal.confirmed)
        logger.info("learner compiled in %.0f s on %s", started.compile_seconds, started.backend)
        if self._cfg.learner.precision == "bfloat16" and started.backend == "cpu":
            logger.warning("bfloat16 is slow on a cpu; --learner.precision float32 trains the same there")
        # Nobody acts or learns before the evaluator is up: its first evaluation is of the untrained policy.
        self._parts.ask(EVALUATOR, "refresh", unless=self._wish.leave_at_first)
        if self._workers.central:
            self._parts.launch(INFERENCE, self._workers.inference, self._begin_inference)
        self._evaluations.begin_if_due(self._counters)
        self._acting = self._learning = True
        for name, index in self._actors.items():
            self._parts.launch(name, partial(self._make_actor, index), partial(self._begin_actor, name))
        self._logged_at = time.monotonic()
        self._learn()

    def _take_over(self, started: Started, resume: bool) -> None:
        """Goes on from what the learner has restored."""
        if resume and started.meta is None:
            self._warn("there is no checkpoint yet: the run starts anew")
        if started.warm is not None:
            logger.info("begins from the checkpoint %s", started.warm.checkpoint)
        if started.meta is not None:
            counters = self._counters = Counters(**started.meta["counters"])
            # The learner counts for itself: a slice may have ended between these counters and its state.
            counters.updates = started.meta["updates"] + counters.lost_updates
            counters.replayed_steps = counters.updates * self._batch_steps
            cut_back(self._run_dir, counters.env_steps, counters.updates)
            self._status.phase = "resuming"
        if self._counters.env_steps >= self._cfg.env_steps:
            raise UserError(
                f"this run already has {self._counters.env_steps} env steps; "
                f"to go on, give --env-steps more than that"
            )

    def _random_steps(self, started: Started) -> int:
        """Agent steps with random actions before a policy acts that has never seen anything."""
        return self._cfg.learner.prefill if started.warm is None else started.warm.random_steps

    # --- parts, at the start and after a failure ---------------------------------------------------

    def _failed(self, name: str, error: Exception) -> None:
        self._counters.restarts += 1
        self._warn(f"{name} failed and is started anew: {first_words(error)}")

    def _make_actor(self, index: int) -> Proxy:
        """Every life is another: its layouts and its noise were never seen before."""
        life, prefill = self._counters.env_steps, self._prefill
        if index in self._lives:
            life, prefill = self._lives[index] + 1 + life, 0
        self._lives[index] = life
        return self._workers.actor(index, life, prefill)

    def _begin_actor(self, name: str) -> None:
        self._parts.call(name, "start", then=lambda _: self._act(name))

    def _begin_replay(self, name: str) -> None:
        self._parts.call(name, "start", then=partial(self._replay_started, name))

    def _replay_started(self, name: str, messages: list[str]) -> None:
        for message in messages:
            self._warn(message)
        if name in self._replays_ready:
            lost = self._saver.lose(name)
            self._counters.lost_steps += lost
            self._warn(f"{name} goes on from its checkpoint: at most {lost} agent steps are lost")
        self._saver.interrupted()
        self._replays_ready.add(name)
        self._replay_infos.pop(name, None)

    def _begin_inference(self) -> None:
        self._parts.call(INFERENCE, "start")

    def _begin_learner(self) -> None:
        self._saver.interrupted()
        self._episodes[:0], self._shown = self._shown, []
        self._parts.call(LEARNER, "start", self._resume, then=self._learner_started)
        self._resume = True

    def _learner_started(self, started: Started) -> None:
        for warning in started.warnings:
            self._warn(f"checkpoint passed over: {warning}")
        if self._started is not None:
            counters = self._counters
            own = 0 if started.meta is None else started.meta["updates"]
            lost = counters.updates - counters.lost_updates - own
            counters.lost_updates += lost
            self._warn(f"the learner goes on from its update {own}: {lost} are lost")
            self._learn()
        self._started = started

    def _begin_evaluator(self) -> None:
        if self._evaluations.running and self._acting:
            self._evaluations.begin(self._counters.env_steps)

    # --- loop -------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._counters.env_steps < self._cfg.env_steps and not self._told_to_stop():
            self._step()
            self._update_status()
            now = time.monotonic()
            if now - self._logged_at >= self._cfg.logging.every_seconds:
                self._log_row()
            self._saver.save_if_due()
            if now - self._looked_at >= _LOOK_SECONDS:
                self._looked_at = now
                self._look_at_servers()
            self._evaluations.begin_if_due(self._counters)

    def _step(self) -> None:
        self._wish.leave_at_second()
        self._parts.step()

    def _act(self, name: str) -> None:
        remaining = self._cfg.env_steps - self._counters.env_steps
        if not self._acting or remaining <= 0:
            return
        share = max(1, remaining // len(self._actors))
        self._call_slice(name, share, self._version, then=lambda report: self._acted(name, report))

    def _call_slice(self, name: str, *args: Any, then: Callable[[Any], None]) -> None:
        seconds = self._cfg.actors.slice_seconds
        patience = seconds + self._cfg.supervision.grace_seconds
        self._parts.call(name, "run", seconds, *args, then=then, patience=patience)

    def _acted(self, name: str, report: RolloutReport) -> None:
        counters = self._counters
        counters.env_steps += report.env_steps
        counters.agent_steps += report.agent_steps
        self._saver.wrote(self._replays[self._actors[name] % len(self._replays)], report.agent_steps)
        if report.env_steps:
            self._parts.progressed(name)
        self._episodes += report.episodes
        self._status.episodes.extend(report.episodes)
        for episode in report.episodes:
            self._record("episode", episode)
        self._rows.mean(report.stats)
        seconds = max(report.seconds, 1e-9)
        self._rows.mean({"time/actors_waiting": report.waited_seconds / seconds})
        if self._cfg.actors.max_staleness:
            self._rows.mean({"time/actors_paused": report.paused_seconds / seconds})
        if report.version:
            self._rows.mean({"replay/staleness": max(0, self._version - report.version)})
        self._act(name)

    def _learn(self) -> None:
        if not self._learning:
            return
        self._shown, self._episodes = self._episodes, []
        self._call_slice(LEARNER, self._shown, self._counters.env_steps, then=self._learned)

    def _learned(self, report: LearnerReport) -> None:
        self._shown = []
        self._counters.replayed_steps += report.replayed_steps
        self._counters.updates = report.updates + self._counters.lost_updates
        self._version = report.version
        if report.replayed_steps:
            self._parts.progressed(LEARNER)
        self._rows.mean(report.metrics)
        self._rows.mean({"time/learner_waiting": report.waited_seconds / max(report.seconds, 1e-9)})
        if "safety/multiplier" in report.metrics:
            self._status.multiplier = report.metrics["safety/multiplier"]
            self._rows.last({"safety/multiplier": report.metrics["safety/multiplier"]})
        self._learn()

    def _look_at_servers(self) -> None:
        for name in self._replays:
            if not self._parts.busy({name}):
                self._parts.call(name, "info", then=partial(self._looked_at_replay, name))
        if self._workers.central and not self._parts.busy({INFERENCE}):
            self._parts.call(INFERENCE, "report", then=self._looked_at_inference)

    def _looked_at_inference(self, report: InferenceReport) -> None:
        self._rows.mean(report.metrics)
        if report.requests:
            self._parts.progressed(INFERENCE)

    def _looked_at_replay(self, name: str, info: ReplayInfo) -> None:
        before = self._replay_infos.get(name)
        if before is not None and info.inserted + info.sampled > before.inserted + before.sampled:
            self._parts.progressed(name)
        self._replay_infos[name] = info
        self._rows.last({"replay/size": sum(info.size for info in self._replay_infos.values())})

    # --- evaluation, checkpoints, rows ------------------------------------------------------------

    def _evaluated(self, env_steps: int, report: EvaluationReport) -> None:
        self._counters.evaluated_at = env_steps
        summary = self._summary = summarize_episodes(report.episodes) | report.model
        self._record("evaluation", summary, env_steps=env_steps)
        self._status.evaluations.append(
            Evaluation(
                env_steps,
                summary["eval/return"],
                summary["eval/return_std"],
                summary["eval/cost"],
                summary["eval/cost_std"],
            )
        )

    def _not_saved(self, why: str) -> None:
        self._rows.count("time/failed_saves")
        self._warn(f"training goes on without a checkpoint, the next is tried in time: {why}")

    def _meta(self) -> dict[str, Any]:
        now = time.monotonic()
        self._counters.wall_seconds += now - self._clock
        self._clock = now
        return {
            "env_steps": self._counters.env_steps,
            "counters": asdict(self._counters),
            "config": to_dict(self._cfg),
            "versions": as_json(self._made_with),
        }

    def _log_row(self) -> None:
        self._logged_at = time.monotonic()
        self._update_status()
        rates = {
            "time/env_steps_per_second": self._status.env_steps_per_second,
            "time/updates_per_second": self._status.updates_per_second,
            "replay/train_ratio": self._train_ratio,
            "train/updates": self._counters.updates,
            "train/lost_updates": self._counters.lost_updates,
            "replay/lost_steps": self._counters.lost_steps,
            "time/restarts": self._counters.restarts,
        }
        row = self._rows.pop()
        self._status.actors_waiting = row.get("time/actors_waiting", self._status.actors_waiting)
        self._status.learner_waiting = row.get("time/learner_waiting", self._status.learner_waiting)
        self._status.staleness = row.get("replay/staleness", self._status.staleness)
        self._record("write", rates | self._parts.metrics() | row)

    def _record(self, method: str, value: Any, env_steps: int | None = None) -> None:
        assert self._journal is not None
        self._journal.record(method, self._counters.env_steps if env_steps is None else env_steps, value)

    def _update_status(self) -> None:
        status, counters, now = self._status, self._counters, time.monotonic()
        self._marks.append((now, counters.env_steps, counters.updates))
        while now - self._marks[0][0] > _RATE_SECONDS:
            self._marks.popleft()
        then, env_steps, updates = self._marks[0]
        elapsed = max(now - then, 1e-9)
        if elapsed > 1.0:
            status.env_steps_per_second = (counters.env_steps - env_steps) / elapsed
            status.updates_per_second = (counters.updates - updates) / elapsed
        status.env_steps, status.updates = counters.env_steps, counters.updates
        status.version = self._version or None
        status.train_ratio = self._train_ratio
        status.down = self._parts.down()
        if self._acting:
            status.phase = "training" if counters.updates else "prefill"

    @property
    def _batch_steps(self) -> int:
        return self._cfg.learner.batch_size * self._cfg.learner.batch_length

    @property
    def _train_ratio(self) -> float:
        return self._counters.train_ratio(self._cfg.learner.prefill)

    # --- end --------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, float] | None:
        self._status.phase = "saving"
        self._acting = False
        self._parts.retire(self._actors)
        self._drain(set(self._actors))
        # The learner goes on meanwhile: the rate limiter may still hold the actors' last windows back.
        for name in self._actors:
            self._parts.call(name, "finish")
        self._drain(set(self._actors))
        if self._workers.central:
            self._parts.retire({INFERENCE})
        self._learning = False
        self._drain({LEARNER, *self._replays})
        self._hand_over_last_episodes()
        if not self._told_to_stop():
            # The final evaluation stands for the periodic one that would be due at once after a resume.
            self._counters.evaluated_at = self._counters.env_steps
        self._ask(LEARNER, "save", self._meta(), patience=SAVE_SECONDS)
        for name in self._saved_replays:
            self._ask(name, "checkpoint", patience=SAVE_REPLAY_SECONDS)
        self._update_status()
        self._log_row()
        summary = None
        if not self._told_to_stop():
            summary = self._final_evaluation()
        self._drain({METRICS})
        self._ask(METRICS, "close")
        self._status.phase = "done" if summary else "stopped"
        return summary

    def _hand_over_last_episodes(self) -> None:
        """Episodes of the last slices still move the multiplier, before it is saved."""
        episodes, self._episodes = self._episodes, []
        self._ask(LEARNER, "run", 0.0, episodes, self._counters.env_steps)

    def _final_evaluation(self) -> dict[str, float] | None:
        self._status.phase = "evaluating"
        self._drain({EVALUATOR})
        self._ask(LEARNER, "publish")
        self._summary = None
        self._evaluations.finish(self._counters.env_steps)
        return self._summary

    def _drain(self, names: set[str]) -> None:
        """Handles what is in flight of these parts. Bounded: a part that hangs is left behind."""
        deadline = time.monotonic() + _SLICE_END_SECONDS
        if EVALUATOR in names:
            deadline = math.inf  # an evaluation is bounded by its episodes
        while self._parts.busy(names):
            if time.monotonic() > deadline or (EVALUATOR in names and self._told_to_stop()):
                logger.warning("did not wait any longer for %s", ", ".join(sorted(names)))
                return
            self._step()

    def _save_what_can_be_saved(self) -> None:
        """After an error: a last checkpoint, unless a part that it needs is what failed."""
        self._status.phase = "saving"
        try:
            self._last_call(LEARNER, "save", self._meta(), seconds=SAVE_SECONDS)
            for name in self._saved_replays:
                self._last_call(name, "checkpoint", seconds=SAVE_REPLAY_SECONDS)
        except Exception as error:
            logger.warning("no last checkpoint could be written: %s", first_words(error))
        metrics = self._parts.proxy(METRICS)
        if metrics is not None:
            wait([metrics.call("close")], _SLICE_END_SECONDS)

    def _last_call(self, name: str, method: str, *args: Any, seconds: float) -> None:
        """One call of a part that nobody starts anew any more."""
        proxy = self._parts.proxy(name)
        if proxy is None:
            raise RuntimeError(f"{name} is down")
        future: Future[Any] = proxy.call(method, *args)
        deadline = time.monotonic() + seconds
        while not future.done() and time.monotonic() < deadline:
            self._wish.leave_at_second()
            wait([future], TICK_SECONDS)
        future.result(0)

    def _ask(self, name: str, method: str, *args: Any, patience: float | None = None) -> Any:
        return self._parts.ask(name, method, *args, patience=patience, unless=self._wish.leave_at_second)

    def _await(self, condition: Callable[[], bool]) -> None:
        """Waits; a signal meanwhile ends the run at once, for nothing has begun."""
        while not condition():
            self._wish.leave_at_first()
            self._parts.step()

    def _told_to_stop(self) -> bool:
        return self._wish.signal is not None

    def _warn(self, text: str) -> None:
        logger.warning(text)
        self._status.warnings.append(text)

    def _stop_is_wished(self, number: int) -> None:
        self._status.warnings.append(
            f"{signal.Signals(number).name}: saving a checkpoint; once more to leave without it"
        )


def actor_name(index: int) -> str:
    """Of an actor, as a part of a run."""
    return f"actor {index}"


def replay_names(count: int) -> list[str]:
    """Of the replay servers, as parts of a run."""
    return ["replay"] if count == 1 else [f"replay {shard}" for shard in range(count)]
