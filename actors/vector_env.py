"""k environments in one process, reset by themselves, with ends staggered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.safety_gym import SafetyGymEnv, make_env
from common.types import Step

_NEVER = np.iinfo(np.int64).max


class SafetyVectorEnv:
    """The `common.types.VectorEnv` of Safety-Gymnasium.

    The first `step` resets every environment; an environment whose last step was `is_last` is reset
    by the next one (`is_first`, reward, cost and env_steps 0, its action is ignored).

    Staggered: the first episode of environment i is cut (`is_last`, not terminal) after about
    (i + 1) / k of the time limit, so that the environments do not all reset at once. `partial`
    [k] marks such ends in the newest step; they are not results.

    The arrays of a `Step` belong to the caller: every call returns new ones.
    """

    def __init__(
        self,
        task: str,
        observation: str,
        action_repeat: int,
        num_envs: int,
        seed: int,
        stagger: bool = True,
        cameras: str = "auto",
    ):
        children = np.random.SeedSequence(seed).spawn(num_envs)
        seeds = [int(child.generate_state(1)[0]) for child in children]
        self._set_up(
            [make_env(task, observation, action_repeat, env_seed, cameras=cameras) for env_seed in seeds]
        )
        if stagger:
            share = np.arange(1, num_envs + 1) / num_envs
            self._cut = np.ceil(share * self.spec.time_limit).astype(np.int64)

    @classmethod
    def for_evaluation(
        cls,
        task: str,
        observation: str,
        action_repeat: int,
        seeds: Sequence[int],
        render: bool = False,
        cameras: str = "auto",
    ) -> SafetyVectorEnv:
        """One environment per seed, each playing one whole episode that begins with `reset(seed)`.

        An environment that has ended waits: `finished` [k] is set and its steps are empty
        (env_steps, reward and cost 0, no flag set). The step after all have ended starts the same
        episodes again. `render=True` allows `render(0)`.
        """
        self = cls.__new__(cls)
        self._set_up(
            [
                make_env(task, observation, action_repeat, render=render and i == 0, cameras=cameras)
                for i in range(len(seeds))
            ]
        )
        self._once = True
        self._reset_seeds = list(seeds)
        return self

    def _set_up(self, envs: list[SafetyGymEnv]) -> None:
        self._envs = envs
        self.spec = envs[0].spec
        self.num_envs = k = len(envs)
        self.partial = np.zeros(k, bool)
        self.finished = np.zeros(k, bool)  # only in evaluation
        self._once = False
        self._reset_seeds: list[int | None] = [None] * k
        self._needs_reset = np.ones(k, bool)
        self._length = np.zeros(k, np.int64)  # env steps in the current episode
        self._cut = np.full(k, _NEVER)  # env steps after which the current episode is cut
        self._obs = [{name: np.zeros(s.shape, s.dtype) for name, s in self.spec.obs.items()}] * k

    def step(self, actions: np.ndarray) -> Step:
        """Acts with `actions` (float32 [k, A]).

        Raises `ValueError` for actions that are not finite and `RuntimeError` (naming task and
        environment) when an environment fails.
        """
        if not np.isfinite(actions).all():
            raise ValueError(f"Actions for {self.spec.task} are not finite: the policy has diverged.")
        if self._once and self.finished.all():
            self.finished = np.zeros(self.num_envs, bool)
            self._needs_reset[:] = True
        self.partial = np.zeros(self.num_envs, bool)
        step = self._empty_step()
        for i, env in enumerate(self._envs):
            try:
                self._step_one(i, env, actions[i], step)
            except Exception as error:
                raise RuntimeError(f"Environment {i} of {self.spec.task} failed: {error!r}") from error
        obs = {name: np.stack([o[name] for o in self._obs]) for name in self.spec.obs}
        return step._replace(obs=obs)

    def _step_one(self, i: int, env: SafetyGymEnv, action: np.ndarray, step: Step) -> None:
        if self._once and self.finished[i]:
            return
        if self._needs_reset[i]:
            self._obs[i] = env.reset(self._reset_seeds[i])
            self._needs_reset[i] = False
            self._length[i] = 0
            step.is_first[i] = True
            return
        outcome = env.step(action)
        self._obs[i] = outcome.obs
        self._length[i] += outcome.env_steps
        ended = outcome.terminated or outcome.truncated
        self.partial[i] = cut = not ended and self._length[i] >= self._cut[i]
        step.reward[i], step.cost[i] = outcome.reward, outcome.cost
        step.env_steps[i] = outcome.env_steps
        step.is_terminal[i] = outcome.terminated
        step.is_last[i] = self._needs_reset[i] = ended or cut
        if step.is_last[i]:
            self._cut[i] = _NEVER
            self.finished[i] = self._once

    def _empty_step(self) -> Step:
        k = self.num_envs
        return Step(
            obs={},
            reward=np.zeros(k, np.float32),
            cost=np.zeros(k, np.float32),
            is_first=np.zeros(k, bool),
            is_last=np.zeros(k, bool),
            is_terminal=np.zeros(k, bool),
            env_steps=np.zeros(k, np.int32),
        )

    def render(self, index: int = 0) -> np.ndarray:
        """An outside view of environment `index`, uint8 [240, 320, 3]."""
        return self._envs[index].render()

    def close(self) -> None:
        for env in self._envs:
            env.close()
