"""Evaluations of a run: one at a time, in slices, while training goes on and at its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from common.config import Config
from deploy.outcome import Counters
from deploy.supervision import EVALUATOR, Supervisor
from deploy.workers import EvaluationReport


class Evaluations:
    """Has the evaluator play.

    Args:
        stopped: whether the run has been told to stop, and an evaluation is not to be played to its end.
        found: hears (env steps, report) of every evaluation that is complete.
    """

    def __init__(
        self,
        cfg: Config,
        parts: Supervisor,
        stopped: Callable[[], bool],
        found: Callable[[int, EvaluationReport], None],
    ):
        self._cfg, self._parts, self._stopped, self._found = cfg, parts, stopped, found
        self._seconds = cfg.actors.slice_seconds
        self._patience = self._seconds + cfg.supervision.grace_seconds
        self.running = False

    def begin_if_due(self, counters: Counters) -> None:
        """Every so many env steps; the final evaluation stands for one that is due at the end."""
        every = self._cfg.evaluation.every
        if self.running or every == 0 or counters.env_steps >= self._cfg.env_steps:
            return
        if counters.env_steps // every > counters.evaluated_at // every:
            self.begin(counters.env_steps)

    def begin(self, env_steps: int) -> None:
        """Begins one that belongs to these env steps."""
        self.running = True
        self._play(env_steps)

    def finish(self, env_steps: int) -> None:
        """Plays the final one and waits for it, unless the run is stopped."""
        report = None
        while report is None and not self._stopped():
            report = self._parts.ask(
                EVALUATOR,
                "evaluate",
                self._seconds,
                self._cfg.evaluation.final_episodes,
                patience=self._patience,
                unless=self._stopped,
            )
        self._end(env_steps, report)

    def _play(self, env_steps: int) -> None:
        self._parts.call(
            EVALUATOR,
            "evaluate",
            self._seconds,
            self._cfg.evaluation.episodes,
            then=partial(self._played, env_steps),
            patience=self._patience,
        )

    def _played(self, env_steps: int, report: EvaluationReport | None) -> None:
        if report is None and not self._stopped():
            self._play(env_steps)
        else:
            self._end(env_steps, report)

    def _end(self, env_steps: int, report: EvaluationReport | None) -> None:
        self.running = False
        if report is not None:
            self._parts.progressed(EVALUATOR)
            self._found(env_steps, report)
