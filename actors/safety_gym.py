"""One Safety-Gymnasium environment: action repeat, normalised actions, exact and fast resets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import numpy as np

from actors import compat, fast_env, fast_reset, rendering, tasks
from actors.cameras import OutsideView, Vision
from actors.observations import Coordinates, Lidar, Observation, Slices
from common.types import VECTOR, ArraySpec, EnvSpec, SceneSpec

_safety_gymnasium = compat.safety_gymnasium()


class Transition(NamedTuple):
    """What one agent step of one environment brought."""

    obs: dict[str, np.ndarray]  # the keys of `spec.obs`: "vector" float32 [n], "image" uint8 [64, 64, 3]
    reward: float  # summed over the action repeat
    cost: float  # summed over the action repeat
    terminated: bool  # the environment itself ended the episode
    truncated: bool  # the time limit did
    env_steps: int  # simulator steps taken: fewer than the action repeat at an episode's end


class _Simulator(Protocol):
    """One env step at a time, in the simulator's own action units.

    `step` returns (reward, cost, terminated, truncated), `observe` new arrays as `obs` says.
    """

    low: np.ndarray
    high: np.ndarray
    obs: dict[str, ArraySpec]
    slices: Slices
    scene: SceneSpec | None

    def reset(self, seed: int | None) -> None: ...

    def step(self, action: np.ndarray) -> tuple[float, float, bool, bool]: ...

    def observe(self) -> dict[str, np.ndarray]: ...

    def render(self) -> np.ndarray: ...

    def close(self) -> None: ...


# Source of an observation -> what reads it into `obs["vector"]`.
_STATES: dict[str, Callable[[Any, fast_env.Lookup], Observation]] = {
    "lidar": Lidar,
    "coordinates": Coordinates,
}


class _Navigation:
    """A navigation task."""

    def __init__(self, task: str, observation: str, repeat: int, cameras: tuple[str, ...], render: bool):
        # A run leaves the stretch that the fixed camera sees.
        camera = "track" if "Run" in task else "fixedfar"
        self._env: Any = _make(task, render, camera)
        self._task = self._env.task
        self.low, self.high = self._env.action_space.low, self._env.action_space.high
        lookup = fast_env.accelerate(self._task)
        self._state: Observation | None = None
        for source in tasks.sources(observation):
            if source in _STATES:
                self._state = _STATES[source](self._task, lookup)
        self._vision = Vision(task, self._task, cameras)
        state = {VECTOR: ArraySpec((self._state.size,))} if self._state else {}
        self.obs, self.slices = state | self._vision.spec, self._state.slices if self._state else {}
        kinds = {name.removesuffix("_lidar") for name in self.slices}
        seconds = repeat * tasks.ENV_STEP_SECONDS[self._task.agent_name]
        self.scene: SceneSpec | None = _scene(self._task, kinds, seconds)
        if render:
            self._task._viewers["rgb_array"] = OutsideView(task, self._task)

    def reset(self, seed: int | None) -> None:
        with fast_reset.light_assets(), self._vision.building():
            self._env.reset(seed=seed)
        if self._state:
            self._state.bind()

    def step(self, action: np.ndarray) -> tuple[float, float, bool, bool]:
        _, reward, cost, terminated, truncated, _ = self._env.step(action)
        return reward, cost, terminated, truncated

    def observe(self) -> dict[str, np.ndarray]:
        state = {VECTOR: self._state.read()} if self._state else {}
        return state | self._vision.read()

    def render(self) -> np.ndarray:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


def _scene(task: Any, kinds: Collection[str], seconds: float) -> SceneSpec | None:
    """Of tasks that pay for the way to a goal alone, where the goal is observed."""
    if "goal" not in kinds or not hasattr(task, "goal") or hasattr(task, "push_box"):
        return None
    payer = getattr(task, "buttons", task.goal)
    costly = tuple(o.name for o in task._obstacles if o.is_constrained and o.name in kinds)
    return SceneSpec(
        radius=float(task.goal.size),
        bonus=float(payer.reward_goal),
        per_metre=float(payer.reward_distance),
        extent=float(max(task.placements_conf.extents)),
        obstacles=costly,
        lidar_range=float(task.lidar_conf.max_dist),
        step_seconds=seconds,
    )


class _Velocity:
    """A velocity task. The time limit is counted here; the bare environments have none."""

    def __init__(self, task: str, render: bool):
        self.slices: Slices = {}
        self.scene: SceneSpec | None = None
        self._env: Any = _make(task, render, camera="track")
        self._limit = tasks.time_limit(task)
        self.low, self.high = self._env.action_space.low, self._env.action_space.high
        self.obs = {VECTOR: ArraySpec((int(np.prod(self._env.observation_space.shape)),))}

    def reset(self, seed: int | None) -> None:
        self._obs, _ = self._env.reset(seed=seed)
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, float, bool, bool]:
        self._obs, reward, cost, terminated, _, _ = self._env.step(action)
        self._steps += 1
        return reward, cost, terminated, self._steps >= self._limit

    def observe(self) -> dict[str, np.ndarray]:
        return {VECTOR: self._obs.astype(np.float32)}

    def render(self) -> np.ndarray:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


def _make(task: str, render: bool, camera: str) -> Any:
    """The bare environment: its wrappers only check and count, which is done here."""
    options: dict[str, Any] = {}
    if render:
        rendering.require_gl()
        width, height = rendering.FRAME_SIZE
        options = {"render_mode": "rgb_array", "width": width, "height": height, "camera_name": camera}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package is older than its numpy
        return _safety_gymnasium.make(task, disable_env_checker=True, **options).unwrapped


class SafetyGymEnv:
    """One environment with normalised actions and action repeat; the caller resets it.

    Deterministic: the same seed and actions give the same episodes. `reset(None)` goes on with the
    stream of layouts that the last seed (of the constructor, at first) started.

    Raises `UserError` for an unknown task, an observation or camera that the task does not have, and
    for vision or `render=True` without OpenGL.
    """

    def __init__(
        self,
        task: str,
        observation: str,
        action_repeat: int,
        seed: int | None = None,
        render: bool = False,
        cameras: str = "auto",
    ):
        tasks.check_observation(task, observation)
        chosen = tasks.cameras(task, observation, cameras)
        self._sim: _Simulator = (
            _Navigation(task, observation, action_repeat, chosen, render)
            if tasks.is_navigation(task)
            else _Velocity(task, render)
        )
        self._middle = (self._sim.high + self._sim.low).astype(np.float64) / 2
        self._half = (self._sim.high - self._sim.low).astype(np.float64) / 2
        self._next_seed = seed
        self._repeat = action_repeat
        self._done = True
        self.spec = EnvSpec(
            task=task,
            obs=dict(self._sim.obs),
            action_size=len(self._middle),
            action_repeat=action_repeat,
            time_limit=tasks.time_limit(task),
            slices=dict(self._sim.slices),
            scene=self._sim.scene,
        )

    def reset(self, seed: int | None = None) -> dict[str, np.ndarray]:
        """Starts an episode and returns its first observation."""
        if seed is None:
            seed, self._next_seed = self._next_seed, None
        else:
            self._next_seed = None
        self._sim.reset(seed)
        self._done = False
        return self._sim.observe()

    def step(self, action: np.ndarray) -> Transition:
        """Repeats `action` (float [A], clipped to [-1, 1]) until the repeat count or the end."""
        if self._done:
            raise RuntimeError("The episode has ended (or never begun): call reset() first.")
        simulated = self._middle + np.clip(action, -1.0, 1.0).astype(np.float64) * self._half
        reward = cost = 0.0
        terminated = truncated = False
        env_steps = 0
        while env_steps < self._repeat and not (terminated or truncated):
            step_reward, step_cost, terminated, truncated = self._sim.step(simulated)
            reward += step_reward
            cost += step_cost
            env_steps += 1
        self._done = terminated or truncated
        obs = self._sim.observe()  # of the last repetition only
        return Transition(obs, float(reward), float(cost), bool(terminated), bool(truncated), env_steps)

    def render(self) -> np.ndarray:
        """An outside view of the current state, uint8 [240, 320, 3]; needs `render=True`."""
        return self._sim.render()

    def close(self) -> None:
        self._sim.close()


def make_env(
    task: str,
    observation: str,
    action_repeat: int,
    seed: int | None = None,
    render: bool = False,
    cameras: str = "auto",
) -> SafetyGymEnv:
    """One environment; see `SafetyGymEnv`."""
    return SafetyGymEnv(task, observation, action_repeat, seed, render, cameras)


def env_spec(task: str, observation: str, action_repeat: int, cameras: str = "auto") -> EnvSpec:
    """The description of an environment, without a reset or a picture (milliseconds after the import).

    Raises `UserError` as `SafetyGymEnv` does, so also for vision without OpenGL.
    """
    env = make_env(task, observation, action_repeat, cameras=cameras)
    env.close()
    return env.spec
