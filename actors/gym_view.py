"""A `gymnasium.Env` view of one environment, for tools that speak Gymnasium."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from actors.safety_gym import make_env
from common.types import VECTOR, ArraySpec

# After `actors.safety_gym`, which imports gymnasium without its notices.
import gymnasium  # isort: skip


class GymView(gymnasium.Env):
    """Actions lie in [-1, 1], the cost is `info["cost"]`.

    Observations are the state vector where there is nothing else, and dicts with the keys of the
    environment's `spec.obs` where there are images. `info["env_steps"]` counts the simulator steps of
    the last agent step.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(
        self,
        task: str,
        observation: str,
        action_repeat: int,
        render_mode: str | None = None,
        cameras: str = "auto",
    ):
        self._env = make_env(
            task, observation, action_repeat, render=render_mode == "rgb_array", cameras=cameras
        )
        self.render_mode = render_mode
        spec = self._env.spec
        self._only_vector = list(spec.obs) == [VECTOR]
        spaces = {name: _space(array) for name, array in spec.obs.items()}
        self.observation_space: gymnasium.spaces.Space = (
            spaces[VECTOR] if self._only_vector else gymnasium.spaces.Dict(spaces)
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; without a seed, the next of the current stream of layouts."""
        super().reset(seed=seed)
        return self._shown(self._env.reset(seed)), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One agent step: (obs, reward, terminated, truncated, info with cost and env_steps)."""
        obs, reward, cost, terminated, truncated, env_steps = self._env.step(action)
        return self._shown(obs), reward, terminated, truncated, {"cost": cost, "env_steps": env_steps}

    def _shown(self, obs: dict[str, np.ndarray]) -> Any:
        return obs[VECTOR] if self._only_vector else obs

    def render(self) -> np.ndarray:
        """uint8 [240, 320, 3]; needs `render_mode="rgb_array"`."""
        return self._env.render()

    def close(self) -> None:
        self._env.close()


def _space(array: ArraySpec) -> gymnasium.spaces.Box:
    if array.dtype == "uint8":
        return gymnasium.spaces.Box(0, 255, array.shape, np.uint8)
    return gymnasium.spaces.Box(-np.inf, np.inf, array.shape, np.float32)
