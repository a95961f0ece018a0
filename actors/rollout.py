"""The acting loop: act, step, write, refresh. Knows nothing of the algorithm behind the policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from common.types import Array, Carry, EpisodeResult, Params, ParamSource, Policy, Step, VectorEnv, Writer

_REFRESH_SECONDS = 0.25  # between two looks for newer parameters


@dataclass
class RolloutReport:
    """What one slice of acting did."""

    env_steps: int = 0
    agent_steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0  # for the rate limiter, that is, for the learner
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
    """Steps a vector environment with the newest parameters and streams what happens to replay.

    Args:
        writers: one per environment.
        random_steps: agent steps (over all environments) taken with uniform random actions first.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        source: ParamSource,
        writers: Sequence[Writer],
        *,
        seed: int,
        name: str,
        random_steps: int = 0,
    ):
        self._env, self._policy, self._source, self._writers = env, policy, source, writers
        self._act = jax.jit(self._split_and_act)
        self._carry = policy.init(env.num_envs)
        self._key = jax.random.PRNGKey(seed)
        self._rng = np.random.default_rng(seed)
        self._random_left = random_steps
        self._version = 0
        self._params: Params | None = None
        self._looked = -float("inf")
        self._actions = np.zeros((env.num_envs, env.spec.action_size), np.float32)
        self._carry_is_stale = np.ones(env.num_envs, bool)
        self._meter = EpisodeMeter(env.num_envs, name)

    def warm_up(self, timeout: float) -> None:
        """Waits for the first parameters and compiles the policy. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while self._params is None:
            self._refresh(force=True)
            if self._params is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no parameters were published within {timeout:.0f} s")
                time.sleep(0.05)
        obs = {
            name: np.zeros((self._env.num_envs, *spec.shape), spec.dtype)
            for name, spec in self._env.spec.obs.items()
        }
        first = np.ones(self._env.num_envs, bool)
        jax.block_until_ready(self._act(self._params, self._carry, obs, first, self._key))

    def run(
        self, seconds: float, max_env_steps: int, should_stop: Callable[[], bool] = lambda: False
    ) -> RolloutReport:
        """Acts for about `seconds`, at most about `max_env_steps`, or until told to stop."""
        report = RolloutReport()
        started = time.monotonic()
        waited = self._waited()
        stats: dict[str, Any] = {}
        while time.monotonic() - started < seconds and report.env_steps < max_env_steps and not should_stop():
            self._refresh()
            stats = self._decide_and_step(report) or stats
        report.seconds = time.monotonic() - started
        report.waited_seconds = self._waited() - waited
        report.version = self._version
        report.stats = {name: float(value) for name, value in stats.items()}
        return report

    def close(self) -> None:
        """Sends what the writers still hold and frees the environments."""
        for writer in self._writers:
            writer.close()
        self._env.close()

    def _decide_and_step(self, report: RolloutReport) -> dict[str, Any]:
        step = self._env.step(self._actions)
        actions, stats = self._choose(step)
        report.env_steps += int(step.env_steps.sum())
        report.agent_steps += int((step.env_steps > 0).sum())
        report.episodes += self._meter.add(step, self._env.partial, self._version)
        self._write(step, actions)
        self._actions = actions
        return stats

    def _choose(self, step: Step) -> tuple[np.ndarray, dict[str, Any]]:
        if self._random_left > 0:
            self._random_left -= len(step.reward)
            return self._rng.uniform(-1, 1, self._actions.shape).astype(np.float32), {}
        # A policy that takes over from random actions begins as if at an episode's start.
        is_first = step.is_first | self._carry_is_stale
        self._carry_is_stale[:] = False
        self._key, self._carry, actions, stats = self._act(
            self._params, self._carry, step.obs, is_first, self._key
        )
        return np.asarray(actions), stats

    def _split_and_act(self, params: Params, carry: Carry, obs: dict, is_first: Array, key: Array) -> tuple:
        """(next key, carry, actions, stats). A split outside would cost as much as a small policy itself."""
        key, key_act = jax.random.split(key)
        return key, *self._policy.act(params, carry, obs, is_first, key_act)

    def _write(self, step: Step, actions: np.ndarray) -> None:
        version = np.asarray(self._version, np.int32)
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
                    "action": actions[i],
                }
            )

    def _refresh(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._looked < _REFRESH_SECONDS:
            return
        self._looked = now
        newer = self._source.get(self._version)
        if newer is not None:
            # One transfer per version; numpy parameters would be transferred at every decision.
            self._version, self._params = newer[0], jax.device_put(newer[1])

    def _waited(self) -> float:
        return sum(getattr(writer, "waited_seconds", 0.0) for writer in self._writers)
