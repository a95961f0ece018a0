"""The control loop of a run: hands out slices of work, counts, evaluates, saves, and ends cleanly.

It is the same for every way to run: `Workers` says where the parts live (threads, Ray).
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from actors.rollout import RolloutReport
from common.config import Config, to_dict
from common.metrics import Aggregator, summarize_episodes
from common.status import Evaluation, Status
from common.types import EnvSpec, EpisodeResult, UserError
from deploy import signals
from deploy.signals import Interrupted
from deploy.workers import Started
from learner.learner import LearnerReport

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_RATE_SECONDS = 15.0  # window of the rates that are shown
_SLICE_END_SECONDS = 30.0  # longest wait for the slices in flight when a run ends
_MAX_FAILURES = 3  # of one actor in a row, without an env step in between
_ONE_SIGNAL_SECONDS = 1.0  # `timeout` and terminals may deliver one wish to stop as several signals


class Proxy(Protocol):
    """A part that lives elsewhere; its calls run one after another, in order."""

    def call(self, method: str, *args: Any) -> Future[Any]: ...


class Workers(Protocol):
    """Where the parts of a run live. Making a proxy starts its part."""

    messages: list[str]  # of the replay server, about damaged checkpoints

    @property
    def learner(self) -> Proxy: ...

    @property
    def evaluator(self) -> Proxy: ...

    @property
    def replay(self) -> Proxy: ...

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> Proxy: ...

    def actor(self, index: int, life: int, prefill: int) -> Proxy: ...

    def close(self) -> None:
        """Ends every part; what must not be lost was saved before."""
        ...


@dataclass
class Counters:
    """What a run has done since it began, over all of its resumes."""

    env_steps: int = 0
    agent_steps: int = 0
    replayed_steps: int = 0
    updates: int = 0
    wall_seconds: float = 0.0
    restarts: int = 0  # of actors
    evaluated_at: int = -1  # env steps of the newest evaluation

    def train_ratio(self, prefill: int) -> float:
        """Realised replayed agent steps per agent step collected after the prefill."""
        return self.replayed_steps / max(1, self.agent_steps - prefill)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    counters: Counters
    signal: int | None  # that ended it early
    summary: dict[str, float] | None  # of the final evaluation


class Driver:
    """Runs one training to its end. `run` blocks; signals end it with a checkpoint."""

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path, workers: Workers, status: Status):
        self._cfg, self._spec, self._run_dir, self._workers = cfg, spec, run, workers
        self._status = status
        self._counters = Counters()
        self._pending: dict[Future[Any], tuple[str, Callable[[Any], Any]]] = {}
        self._rows = Aggregator()
        self._episodes: list[EpisodeResult] = []  # finished, not yet seen by the learner
        self._actors: dict[int, Proxy] = {}
        self._lives: dict[int, int] = {}
        self._failures: dict[int, int] = {}
        self._marks: deque[tuple[float, int, int]] = deque()
        self._acting = True
        self._stopping = False
        self._signal: int | None = None
        self._signalled_at = 0.0
        self._leaving: int | None = None  # the second signal
        self._evaluating = False
        self._saving = False
        self._metrics: Proxy | None = None
        self._version = 0
        self._clock = time.monotonic()

    def run(self, resume: bool) -> Outcome:
        """Trains until `env_steps`, SIGINT or SIGTERM.

        Raises:
            UserError: training cannot start or go on (what was trained is saved first if it can be).
        """
        with signals.handled(self._on_signal):
            self._start(resume)
            try:
                self._loop()
            except BaseException:
                self._acting, self._stopping = False, True
                self._save_what_can_be_saved()
                raise
            summary = self._finish()
        return Outcome(self._counters, self._signal, summary)

    # --- start ------------------------------------------------------------------------------------

    def _start(self, resume: bool) -> None:
        self._status.phase = "compiling"
        started: Started = self._await(self._workers.learner.call("start", resume))
        for warning in started.warnings:
            self._warn(f"checkpoint passed over: {warning}")
        if resume and started.meta is None:
            self._warn("there is no checkpoint yet: the run starts anew")
        if started.warm is not None:
            logger.info("begins from the checkpoint %s", started.warm.checkpoint)
        if started.meta is not None:
            self._counters = Counters(**started.meta["counters"])
            # The learner counts for itself: a slice may have ended between these counters and its state.
            self._counters.updates = started.meta["updates"]
            self._counters.replayed_steps = started.meta["updates"] * self._batch_steps
            self._status.phase = "resuming"
        if self._counters.env_steps >= self._cfg.env_steps:
            raise UserError(
                f"this run already has {self._counters.env_steps} env steps; "
                f"to go on, give --env-steps more than that"
            )
        resumed_at = self._counters.env_steps if started.meta is not None else -1
        self._metrics = self._workers.metrics(to_dict(self._cfg), resumed_at if resume else None)
        self._await(
            self._metrics.call(
                "write", self._counters.env_steps, {"time/compile_seconds": started.compile_seconds}
            )
        )
        logger.info("learner compiled in %.0f s on %s", started.compile_seconds, started.backend)
        # Nobody acts or learns before the evaluator is up: its first evaluation is of the untrained policy.
        self._await(self._workers.evaluator.call("refresh"))
        if self._evaluation_is_due():
            self._evaluate()
        prefill = 0 if started.meta else math.ceil(self._random_steps(started) / self._cfg.actors.count)
        for index in range(self._cfg.actors.count):
            self._launch_actor(index, self._counters.env_steps, prefill)
        self._logged_at = self._saved_at = time.monotonic()
        self._learn()

    def _random_steps(self, started: Started) -> int:
        """Agent steps with random actions before a policy acts that has never seen anything."""
        return self._cfg.learner.prefill if started.warm is None else started.warm.random_steps

    def _launch_actor(self, index: int, life: int, prefill: int) -> None:
        self._lives[index] = life
        self._actors[index] = self._workers.actor(index, life, prefill)
        self._submit(f"actor{index}", self._actors[index].call("start"), lambda _: self._act(index))

    # --- loop -------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._counters.env_steps < self._cfg.env_steps and self._signal is None:
            self._handle_completed(_TICK_SECONDS)
            self._update_status()
            now = time.monotonic()
            if now - self._logged_at >= self._cfg.logging.every_seconds:
                self._log_row()
            if now - self._saved_at >= self._cfg.checkpoint.every_seconds and not self._saving:
                self._save()
            if self._evaluation_is_due():
                self._evaluate()

    def _handle_completed(self, timeout: float) -> None:
        self._leave_if_told()
        done, _ = wait(self._pending, timeout, FIRST_COMPLETED)
        if not self._pending:
            time.sleep(timeout)
        for future in done:
            name, handler = self._pending.pop(future)
            try:
                result = future.result()
            except Exception as error:
                if not name.startswith("actor"):
                    raise
                self._replace_actor(int(name.removeprefix("actor")), error)
            else:
                handler(result)

    def _submit(self, name: str, future: Future[Any], handler: Callable[[Any], Any]) -> None:
        self._pending[future] = (name, handler)

    def _act(self, index: int) -> None:
        remaining = self._cfg.env_steps - self._counters.env_steps
        if not self._acting or remaining <= 0:
            return
        share = max(1, remaining // len(self._actors))
        future = self._actors[index].call("run", self._cfg.actors.slice_seconds, share)
        self._submit(f"actor{index}", future, lambda report: self._acted(index, report))

    def _acted(self, index: int, report: RolloutReport) -> None:
        counters = self._counters
        counters.env_steps += report.env_steps
        counters.agent_steps += report.agent_steps
        if report.env_steps:
            self._failures[index] = 0
        self._episodes += report.episodes
        self._status.episodes.extend(report.episodes)
        for episode in report.episodes:
            self._record("episode", episode)
        self._rows.mean(report.stats)
        self._rows.mean({"time/actors_waiting": report.waited_seconds / max(report.seconds, 1e-9)})
        if report.version:
            self._rows.mean({"replay/staleness": max(0, self._version - report.version)})
        self._act(index)

    def _replace_actor(self, index: int, error: Exception) -> None:
        """Starts a failed actor anew: a fresh stream, the others never stop."""
        if not self._acting:
            self._warn(f"actor {index} failed at the end: {_first_words(error)}")
            return
        self._failures[index] = self._failures.get(index, 0) + 1
        if self._failures[index] > _MAX_FAILURES:
            raise UserError(
                f"actor {index} failed {_MAX_FAILURES + 1} times in a row: {_first_words(error)}"
            ) from error
        self._counters.restarts += 1
        self._warn(f"actor {index} failed and is restarted: {_first_words(error)}")
        self._rows.count("time/restarts")
        self._launch_actor(index, self._lives[index] + 1 + self._counters.env_steps, 0)

    def _learn(self) -> None:
        if self._stopping:
            return
        episodes, self._episodes = self._episodes, []
        seconds, env_steps = self._cfg.actors.slice_seconds, self._counters.env_steps
        future = self._workers.learner.call("run", seconds, episodes, env_steps)
        self._submit("learner", future, self._learned)

    def _learned(self, report: LearnerReport) -> None:
        self._counters.replayed_steps += report.replayed_steps
        self._counters.updates = report.updates
        self._version = report.version
        self._rows.mean(report.metrics)
        self._rows.mean({"time/learner_waiting": report.waited_seconds / max(report.seconds, 1e-9)})
        if "safety/multiplier" in report.metrics:
            self._status.multiplier = report.metrics["safety/multiplier"]
            self._rows.last({"safety/multiplier": report.metrics["safety/multiplier"]})
        self._learn()

    # --- evaluation, checkpoints, rows ------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        counters, every = self._counters, self._cfg.evaluation.every
        if self._evaluating or every == 0 or counters.env_steps >= self._cfg.env_steps:
            return False  # the final evaluation stands for one that is due at the end
        return counters.env_steps // every > counters.evaluated_at // every

    def _evaluate(self) -> None:
        self._evaluating = True
        at = self._counters.env_steps
        future = self._workers.evaluator.call("evaluate", self._cfg.evaluation.episodes)
        self._submit("evaluator", future, lambda results: self._evaluated(at, results))

    def _evaluated(self, env_steps: int, results: list[EpisodeResult] | None) -> dict[str, float] | None:
        self._evaluating = False
        if not results:
            return None
        self._counters.evaluated_at = env_steps
        summary = summarize_episodes(results)
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
        return summary

    def _save(self) -> None:
        """Saves learner and replay without holding up the loop."""
        self._saving, self._saved_at = True, time.monotonic()
        self._submit("learner", self._workers.learner.call("save", self._meta()), self._saved_learner)

    def _saved_learner(self, _: Any) -> None:
        if not self._cfg.replay.checkpoint:
            self._saving = False
            return
        self._submit("replay", self._workers.replay.call("checkpoint"), self._saved_replay)

    def _saved_replay(self, _: Any) -> None:
        self._saving = False

    def _meta(self) -> dict[str, Any]:
        now = time.monotonic()
        self._counters.wall_seconds += now - self._clock
        self._clock = now
        return {
            "env_steps": self._counters.env_steps,
            "counters": asdict(self._counters),
            "config": to_dict(self._cfg),
        }

    def _log_row(self) -> None:
        self._logged_at = time.monotonic()
        self._update_status()
        rates = {
            "time/env_steps_per_second": self._status.env_steps_per_second,
            "time/updates_per_second": self._status.updates_per_second,
            "replay/train_ratio": self._train_ratio,
            "train/updates": self._counters.updates,
        }
        row = self._rows.pop()
        self._status.actors_waiting = row.get("time/actors_waiting", self._status.actors_waiting)
        self._status.learner_waiting = row.get("time/learner_waiting", self._status.learner_waiting)
        self._status.staleness = row.get("replay/staleness", self._status.staleness)
        self._record("write", rates | row)

    def _record(self, method: str, value: Any, env_steps: int | None = None) -> None:
        assert self._metrics is not None
        at = self._counters.env_steps if env_steps is None else env_steps
        self._submit("metrics", self._metrics.call(method, at, value), lambda _: None)

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
        actors = {f"actor{index}" for index in self._actors}
        self._acting = False
        self._drain(actors)
        # The learner goes on meanwhile: the rate limiter may still hold the actors' last windows back.
        for index, proxy in self._actors.items():
            self._submit(f"actor{index}", proxy.call("finish"), lambda _: None)
        self._drain(actors)
        self._stopping = True
        self._drain({"learner", "replay"})
        self._hand_over_last_episodes()
        if self._signal is None:
            # The final evaluation stands for the periodic one that would be due at once after a resume.
            self._counters.evaluated_at = self._counters.env_steps
        self._await_all([self._workers.learner.call("save", self._meta())])
        if self._cfg.replay.checkpoint:
            self._await_all([self._workers.replay.call("checkpoint")])
        self._update_status()
        self._log_row()
        summary = None
        if self._signal is None:
            summary = self._final_evaluation()
        self._drain({"metrics"})
        assert self._metrics is not None
        self._await_all([self._metrics.call("close")])
        self._status.phase = "done" if summary else "stopped"
        return summary

    def _hand_over_last_episodes(self) -> None:
        """Episodes of the last slices still move the multiplier, before it is saved."""
        episodes, self._episodes = self._episodes, []
        self._await_all([self._workers.learner.call("run", 0.0, episodes, self._counters.env_steps)])

    def _final_evaluation(self) -> dict[str, float] | None:
        self._status.phase = "evaluating"
        self._drain({"evaluator"})
        self._await_all([self._workers.learner.call("publish")])
        future = self._workers.evaluator.call("evaluate", self._cfg.evaluation.final_episodes)
        while not future.done() and self._signal is None:
            wait([future], _TICK_SECONDS)
        return self._evaluated(self._counters.env_steps, future.result()) if self._signal is None else None

    def _drain(self, names: set[str]) -> None:
        """Handles what is in flight of these parts. Bounded: a part that hangs is left behind."""
        deadline = time.monotonic() + _SLICE_END_SECONDS
        if "evaluator" in names:
            deadline = math.inf  # an evaluation is bounded by its episodes
        while any(name in names for name, _ in self._pending.values()):
            if time.monotonic() > deadline or ("evaluator" in names and self._signal is not None):
                logger.warning("did not wait any longer for %s", ", ".join(sorted(names)))
                return
            self._handle_completed(_TICK_SECONDS)

    def _save_what_can_be_saved(self) -> None:
        """After an error: a last checkpoint, unless the learner itself is what failed."""
        self._status.phase = "saving"
        try:
            self._await_all([self._workers.learner.call("save", self._meta())])
            if self._cfg.replay.checkpoint:
                self._await_all([self._workers.replay.call("checkpoint")])
        except Exception as error:
            logger.warning("no last checkpoint could be written: %s", _first_words(error))
        assert self._metrics is not None
        wait([self._metrics.call("close")], _SLICE_END_SECONDS)

    def _await(self, future: Future[Any]) -> Any:
        """Waits for one result; a signal meanwhile ends the run at once, for nothing has begun."""
        while True:
            done, _ = wait([future], _TICK_SECONDS)
            if done:
                return future.result()
            if self._signal is not None:
                raise Interrupted(self._signal)

    def _await_all(self, futures: list[Future[Any]]) -> None:
        for future in futures:
            while not future.done():
                self._leave_if_told()
                wait([future], _TICK_SECONDS)
            future.result()

    def _leave_if_told(self) -> None:
        if self._leaving is not None:
            raise Interrupted(self._leaving)

    def _warn(self, text: str) -> None:
        logger.warning(text)
        self._status.warnings.append(text)

    def _on_signal(self, number: int) -> None:
        """The first ends the run with a checkpoint, a second one without.

        It only takes note: an exception raised here may be swallowed (in a garbage collector's callback).
        """
        now = time.monotonic()
        if self._signal is not None:
            if now - self._signalled_at > _ONE_SIGNAL_SECONDS:
                self._leaving = number
            return
        self._signal, self._signalled_at = number, now
        self._status.warnings.append(
            f"{signal.Signals(number).name}: saving a checkpoint; once more to leave without it"
        )


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or repr(error)


def exit_code(outcome: Outcome) -> int:
    """0 for a completed run, 128 + signal for an interrupted one."""
    return 0 if outcome.signal is None else 128 + outcome.signal
