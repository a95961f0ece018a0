"""The vocabulary that all rooms share: specs, steps, and the seams between parts.

Nothing here computes. `learner`, `actors` and `replay` never import each other; they meet in
`deploy/wiring.py` through the types below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any  # a numpy or jax array; shapes are given where it is used
Params = Any  # pytree of arrays
Carry = Any  # pytree of arrays [k, ...]: recurrent policy state
Batch = dict[str, Array]  # [B, T, ...], keys as in `replay_spec`

VECTOR = "vector"  # key of the state observation in every obs dict


class UserError(Exception):
    """Something the user can put right. The command line prints it as one sentence, exit code 2."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and numpy dtype name of one array, without batch axes."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class SceneSpec:
    """A task with a goal: what it pays for every metre nearer to the goal and for being within its radius,
    whereupon the next one appears, and how its observation is to be read."""

    radius: float  # m
    bonus: float
    per_metre: float
    extent: float  # m, half the arena's width
    obstacles: tuple[str, ...]  # kinds of objects whose nearness costs
    lidar_range: float  # m, where a lidar reads 0
    step_seconds: float  # of an agent step


@dataclass(frozen=True)
class EnvSpec:
    """What a learner and a replay server must know about an environment.

    `obs` may hold "vector" (state) and "image", "image2", ... (one per camera, uint8 [64, 64, 3]).
    `slices` describes `obs["vector"]`: name -> (start, stop). Positions of objects are egocentric
    (x, y) pairs in metres, so `slices["hazards"] == (9, 25)` means eight hazards.
    """

    task: str
    obs: Mapping[str, ArraySpec]
    action_size: int
    action_repeat: int  # env steps per agent step
    time_limit: int  # env steps per episode
    slices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scene: SceneSpec | None = None  # of tasks whose observation says where goal and obstacles are


def replay_spec(spec: EnvSpec) -> dict[str, ArraySpec]:
    """Arrays stored for every step of a stream, in the order of their sorted names."""
    scalars = {
        "reward": ArraySpec((), "float32"),
        "cost": ArraySpec((), "float32"),
        "is_first": ArraySpec((), "bool"),
        "is_last": ArraySpec((), "bool"),
        "is_terminal": ArraySpec((), "bool"),
        "version": ArraySpec((), "int32"),
    }
    entries = {**spec.obs, **scalars, "action": ArraySpec((spec.action_size,), "float32")}
    return dict(sorted(entries.items()))


class Step(NamedTuple):
    """One agent step of k environments.

    Reward and cost were received on *arriving* at `obs`, summed over the action repeat; they are
    zero at `is_first`. A step whose predecessor was `is_last` is a reset: the action is ignored.
    """

    obs: dict[str, np.ndarray]  # name -> [k, ...]
    reward: np.ndarray  # float32 [k]
    cost: np.ndarray  # float32 [k], count of env steps with a violation (navigation tasks)
    is_first: np.ndarray  # bool [k]
    is_last: np.ndarray  # bool [k], terminated or truncated
    is_terminal: np.ndarray  # bool [k], the environment itself terminated
    env_steps: np.ndarray  # int32 [k], simulator steps this agent step took; 0 at a reset


@dataclass(frozen=True)
class EpisodeResult:
    """A finished, complete episode (staggered first episodes are never reported)."""

    return_: float  # undiscounted sum of rewards
    cost: float  # undiscounted sum of costs
    length: int  # env steps
    version: int  # parameters that acted at the end
    source: str  # e.g. "actor0/env3" or "eval/env0"


class VectorEnv(Protocol):
    """k environments stepped together; `actions` are in [-1, 1]."""

    spec: EnvSpec
    num_envs: int
    partial: np.ndarray  # bool [k]: ends of the newest step that cut an episode short; not results

    def step(self, actions: np.ndarray) -> Step:
        """Acts with [k, A] float32 actions; the first call of all resets every environment."""
        ...

    def close(self) -> None: ...


class EvaluationEnv(VectorEnv, Protocol):
    """A vector environment whose environments play one episode each, then wait (empty steps)."""

    finished: np.ndarray  # bool [k]

    def render(self, index: int) -> np.ndarray:
        """An outside view, uint8 [h, w, 3]."""
        ...


class Policy(NamedTuple):
    """Pure, jittable functions; `act` is closed over sizes but not over parameters."""

    init: Callable[[int], Carry]  # k -> carry for k environments
    # (params, carry, obs, is_first, key) -> (carry, actions [k, A], stats)
    act: Callable[[Params, Carry, dict[str, Array], Array, Array], tuple[Carry, Array, dict]]


class Writer(Protocol):
    """Appends the stream of ONE environment to replay."""

    def admit(self) -> bool:
        """Waits while the rate limiter holds this writer back; whether a step may be acted and appended now.

        Whoever appends although it is not admitted is not refused: what waits only grows.
        """
        ...

    def append(self, step: Mapping[str, np.ndarray]) -> None:
        """Appends one step, keys as in `replay_spec`. Blocks only while the rate limiter says so."""
        ...

    def close(self) -> None:
        """Sends what is still buffered."""
        ...


class ParamSource(Protocol):
    """Where an actor finds the newest parameters."""

    def get(self, have: int) -> tuple[int, Params] | None:
        """(version, params) if there is a version newer than `have`, else None."""
        ...
