"""A `gymnasium.Env` view of one environment, for tools that speak Gymnasium."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from actors.safety_gym import make_env
from common.types import VECTOR

# After `actors.safety_gym`, which imports gymnasium without its notices.
import gymnasium  # isort: skip


class GymView(gymnasium.Env):
    """Observations are the state vector, actions lie in [-1, 1], the cost is `info["cost"]`.

    `info["env_steps"]` counts the simulator steps of the last agent step.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, task: str, observation: str, action_repeat: int, render_mode: str | None = None):
        self._env = make_env(task, observation, action_repeat, render=render_mode == "rgb_array")
        self.render_mode = render_mode
        spec = self._env.spec
        shape = spec.obs[VECTOR].shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; without a seed, the next of the current stream of layouts."""
        super().reset(seed=seed)
        return self._env.reset(seed)[VECTOR], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One agent step: (obs, reward, terminated, truncated, info with cost and env_steps)."""
        obs, reward, cost, terminated, truncated, env_steps = self._env.step(action)
        return obs[VECTOR], reward, terminated, truncated, {"cost": cost, "env_steps": env_steps}

    def render(self) -> np.ndarray:
        """uint8 [240, 320, 3]; needs `render_mode="rgb_array"`."""
        return self._env.render()

    def close(self) -> None:
        self._env.close()
