from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from common.configuration import load, merge

# Networks and batches for runs whose result does not matter, on the real default task.
TINY: dict[str, Any] = {
    "backend": "inline",
    "env_steps": 2_000,
    "env": {"action_repeat": 20},
    "actors": {"count": 1, "envs": 2, "slice_seconds": 0.3},
    "world_model": {
        "deter": 16,
        "units": 16,
        "stoch": 2,
        "classes": 4,
        "encoder_layers": 1,
        "encoder_units": 16,
        "bins": 11,
    },
    "behavior": {"layers": 1, "units": 16, "horizon": 3, "imagine_starts": 8},
    # Shapes as in tools/faults.py: what is compiled for one is found in the cache by the other.
    "planner": {"samples": 8, "elites": 2, "iterations": 1, "horizon": 3},
    "learner": {"batch_size": 4, "batch_length": 8, "train_ratio": 8.0, "prefill": 200, "publish_every": 2},
    "replay": {"capacity": 4_000, "stride": 2},
    "evaluation": {"every": 0, "episodes": 1, "final_episodes": 1},
    "logging": {"every_seconds": 0.5, "tensorboard": False, "live": False},
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """`tiny_config(env_steps=100, ...)`: the default method on SafetyPointGoal1-v0, as small as it goes."""

    def make(**changes: Any) -> Config:
        return merge(merge(load(), TINY, "tiny"), changes, "test")

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Config]) -> Path:
    """A run directory with two checkpoints, as training leaves it; tests copy it before they change it."""
    from deploy import run_dir as runs
    from deploy import wiring
    from learner.learner import Learner

    cfg = tiny_config()
    run = runs.create(tmp_path_factory.mktemp("trained") / "run", cfg)
    train = wiring.train_step(cfg, wiring.spec_of(cfg))
    learner = Learner(train, lambda timeout: None, lambda version, params: None, run)
    for env_steps in (1_000, 2_000):
        learner.save(run / runs.CHECKPOINTS, meta_of(cfg, env_steps))
    return run


def meta_of(cfg: Config, env_steps: int) -> dict[str, Any]:
    """What the driver tells a checkpoint."""
    from common.configuration import to_dict
    from deploy.outcome import Counters

    counters = Counters(env_steps=env_steps, agent_steps=env_steps // cfg.env.action_repeat)
    return {"env_steps": env_steps, "counters": dataclasses.asdict(counters), "config": to_dict(cfg)}
