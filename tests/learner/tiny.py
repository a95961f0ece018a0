"""The smallest system that has every part, and data for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from common.config import BehaviorConfig, Config, PlannerConfig, SafetyConfig, WorldModelConfig
from common.types import ArraySpec, EnvSpec, SceneSpec

T = TypeVar("T")

MODEL = WorldModelConfig(
    deter=8,
    units=8,
    stoch=2,
    classes=3,
    encoder_layers=1,
    encoder_units=8,
    head_layers=1,
    bins=11,
    bin_range=5.0,
)
BEHAVIOR = BehaviorConfig(layers=1, units=8, horizon=3, gamma=0.9)
PLANNER = PlannerConfig(samples=12, elites=4, iterations=2, horizon=3)
SPEC = EnvSpec(
    task="Tiny-v0",
    obs={"vector": ArraySpec((6,))},
    action_size=2,
    action_repeat=1,
    time_limit=100,
    slices={"hazards": (2, 6)},
)
SCENE = EnvSpec(
    task="Tiny-v0",
    obs={"vector": ArraySpec((13,))},
    action_size=2,
    action_repeat=1,
    time_limit=100,
    slices={
        "velocimeter": (0, 2),
        "gyro": (2, 3),
        "goal": (3, 5),
        "hazards": (5, 9),
        "rotation": (9, 11),
        "position": (11, 13),
    },
    scene=SceneSpec(
        radius=0.3,
        bonus=1.0,
        per_metre=2.0,
        extent=1.5,
        obstacles=("hazards",),
        lidar_range=3.0,
        step_seconds=0.1,
    ),
)
CONFIG = Config(
    world_model=MODEL,
    behavior=BEHAVIOR,
    planner=PLANNER,
    safety=SafetyConfig(constraint="augmented"),
)
FEAT = MODEL.deter + MODEL.stoch * MODEL.classes


def batch(seed: int = 0, size: int = 2, length: int = 4) -> dict[str, np.ndarray]:
    """A replayed batch with an episode's border inside and costs on both sides of one."""
    rng = np.random.default_rng(seed)
    shape = (size, length)
    is_first = np.zeros(shape, bool)
    is_first[0, 2] = True
    is_terminal = np.zeros(shape, bool)
    is_terminal[0, 1] = True
    cost = rng.choice([0.0, 0.5, 1.0, 3.0], shape).astype(np.float32)
    cost[0, :2] = 0.5, 1.0
    return {
        "vector": rng.normal(0, 2, (*shape, 6)).astype(np.float32),
        "action": rng.uniform(-1, 1, (*shape, 2)).astype(np.float32),
        "reward": rng.normal(0, 1, shape).astype(np.float32),
        "cost": cost,
        "is_first": is_first,
        "is_last": is_terminal.copy(),
        "is_terminal": is_terminal,
        "version": np.zeros(shape, np.int32),
    }


def filled(build: Callable[[], T], seed: int = 0, scale: float = 0.4) -> T:
    """A module with every array drawn at random (scales of norms around 1), so that none is zero.

    Nothing is compiled: `build` is only traced.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        values = scale * rng.normal(size=x.shape)
        return jnp.asarray(values + (path[-1] == GetAttrKey("scale")), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(build))
