"""The acting loop: step, decide, write. Knows nothing of the policy behind the decisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.inference import Inference
from common.types import EpisodeResult, Step, VectorEnv, Writer

_PAUSE_SECONDS = 0.05  # between two looks for parameters that are new enough


@dataclass
class RolloutReport:
    """What one slice of acting did."""

    env_steps: int = 0
    agent_steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0  # for the rate limiter, that is, for the learner
    paused_seconds: float = 0.0  # for parameters that are new enough
    version: int = 0
    episodes: list[EpisodeResult] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)  # the policy's own, e.g. plan/num_safe


class EpisodeMeter:
    """Sums reward, cost and length per environment, and hands out complete episodes."""

    def __init__(self, num_envs: int, name: str):
        self._name = name
        self._return = np.zeros(num_envs)
        self._cost = np.zeros(num_envs)
        self._length = np.zeros(num_envs, np.int64)

    def add(self, step: Step, partial: np.ndarray, version: int) -> list[EpisodeResult]:
        """Adds one step of all environments; `partial` [k] marks ends of episodes that were cut short."""
        for total, value in (
            (self._return, step.reward),
            (self._cost, step.cost),
            (self._length, step.env_steps),
        ):
            total[step.is_first] = 0
            total += value
        return [
            EpisodeResult(
                float(self._return[i]),
                float(self._cost[i]),
                int(self._length[i]),
                version,
                f"{self._name}/env{i}",
            )
            for i in np.flatnonzero(step.is_last & ~partial)
        ]


class Rollout:
    """Steps a vector environment as an `Inference` decides and streams what happens to replay.

    Args:
        writers: one per environment.
        random_steps: agent steps (over all environments) taken with uniform random actions first.
        max_staleness: versions that the parameters may be behind the newest; 0: any number.
    """

    def __init__(
        self,
        env: VectorEnv,
        inference: Inference,
        writers: Sequence[Writer],
        *,
        seed: int,
        name: str,
        random_steps: int = 0,
        max_staleness: int = 0,
    ):
        self._env, self._inference, self._writers = env, inference, writers
        self._rng = np.random.default_rng(seed)
        self._random_left = random_steps
        self._max_staleness = max_staleness
        self._actions = np.zeros((env.num_envs, env.spec.action_size), np.float32)
        self._undecided: Step | None = None  # the newest step, while nobody has decided what follows it
        self._carry_is_stale = np.ones(env.num_envs, bool)
        self._meter = EpisodeMeter(env.num_envs, name)

    def warm_up(self, timeout: float) -> None:
        """Waits for the first parameters and compiles the policy. Raises TimeoutError."""
        self._inference.warm_up(timeout)

    def run(
        self,
        seconds: float,
        max_env_steps: int,
        should_stop: Callable[[], bool] = lambda: False,
        newest: int = 0,
    ) -> RolloutReport:
        """Acts for about `seconds`, at most about `max_env_steps`, or until told to stop.

        `newest` is the version of the newest parameters that the caller knows of.
        """
        report = RolloutReport()
        started = time.monotonic()
        waited = self._waited()
        stats: dict[str, Any] = {}
        while time.monotonic() - started < seconds and report.env_steps < max_env_steps and not should_stop():
            if not all(writer.admit() for writer in self._writers):
                continue  # the learner is behind: what would be acted now had to wait for it
            if self._is_stale(newest):
                time.sleep(_PAUSE_SECONDS)
                report.paused_seconds += _PAUSE_SECONDS
            else:
                stats = self._step_and_decide(report) or stats
        report.seconds = time.monotonic() - started
        report.waited_seconds = self._waited() - waited
        report.version = self._inference.version
        report.stats = {name: float(value) for name, value in stats.items()}
        return report

    def close(self) -> None:
        """Sends what the writers still hold and frees the environments."""
        for writer in self._writers:
            writer.close()
        self._env.close()

    def _is_stale(self, newest: int) -> bool:
        if self._max_staleness == 0 or self._random_left > 0:
            return False
        oldest = newest - self._max_staleness
        # A look for newer parameters may be a call to another process.
        return self._inference.version < oldest and self._inference.catch_up() < oldest

    def _step_and_decide(self, report: RolloutReport) -> dict[str, Any]:
        step = self._undecided or self._step(report)
        choice = self._choose(step)
        self._undecided = step if choice is None else None
        if choice is None:
            return {}
        self._actions, stats = choice
        self._write(step)
        return stats

    def _step(self, report: RolloutReport) -> Step:
        step = self._env.step(self._actions)
        report.env_steps += int(step.env_steps.sum())
        report.agent_steps += int((step.env_steps > 0).sum())
        report.episodes += self._meter.add(step, self._env.partial, self._inference.version)
        return step

    def _choose(self, step: Step) -> tuple[np.ndarray, dict[str, Any]] | None:
        if self._random_left > 0:
            self._random_left -= len(step.reward)
            return self._rng.uniform(-1, 1, self._actions.shape).astype(np.float32), {}
        # A policy that takes over from random actions begins as if at an episode's start.
        choice = self._inference.act(step.obs, step.is_first | self._carry_is_stale)
        if choice is not None:
            self._carry_is_stale[:] = False
        return choice

    def _write(self, step: Step) -> None:
        version = np.asarray(self._inference.version, np.int32)
        for i, writer in enumerate(self._writers):
            writer.append(
                {
                    **{name: value[i] for name, value in step.obs.items()},
                    "reward": step.reward[i],
                    "cost": step.cost[i],
                    "is_first": step.is_first[i],
                    "is_last": step.is_last[i],
                    "is_terminal": step.is_terminal[i],
                    "version": version,
                    "action": self._actions[i],
                }
            )

    def _waited(self) -> float:
        return sum(getattr(writer, "waited_seconds", 0.0) for writer in self._writers)
