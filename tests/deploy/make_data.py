"""Writes tests/deploy/data/STACK: a tiny agent of this Python's set of packages, and how it acts.

    python -m tests.deploy.make_data

It is trained as by `safedreamer train`, with a latent state, so that the checkpoint holds every kind of
array.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import checkpoint
from common.configuration import load, merge
from deploy import run_dir as runs
from deploy import wiring
from deploy.evaluate import Loaded
from deploy.evaluate import load as load_agent
from deploy.stack import stack
from deploy.train import train
from tests.deploy.conftest import TINY

DATA = Path(__file__).parent / "data"
ACTED = "acted.npz"
_EPISODES, _STEPS = 3, 25
_CHANGES: dict[str, Any] = {
    "env_steps": 3_000,
    "learner": {"prefill": 50},
    "world_model": {"latent": True},
    "replay": {"server": "memory"},
}


def act(agent: Loaded, observations: dict[str, np.ndarray]) -> np.ndarray:
    """What an agent does [T, k, A] where it sees these observations [T, k, ...] from the start."""
    policy = wiring.policy(agent.cfg, wiring.spec_of(agent.cfg), explore=False)
    steps, count = next(iter(observations.values())).shape[:2]
    choose, carry, actions = jax.jit(policy.act), policy.init(count), []
    for step, key in enumerate(jax.random.split(jax.random.PRNGKey(0), steps)):
        obs = {name: values[step] for name, values in observations.items()}
        carry, chosen, _ = choose(agent.params, carry, obs, np.full(count, step == 0), key)
        actions.append(np.asarray(chosen))
    return np.stack(actions)


def _observed(agent: Loaded) -> dict[str, np.ndarray]:
    """Observations [T, k, ...] of random actions."""
    env, random = wiring.evaluation_env(agent.cfg, 0, _EPISODES), np.random.default_rng(0)
    size = (_EPISODES, env.spec.action_size)
    seen = [env.step(random.uniform(-1, 1, size).astype(np.float32)).obs for _ in range(_STEPS)]
    env.close()
    return {name: np.stack([obs[name] for obs in seen]) for name in seen[0]}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        cfg = merge(merge(load(), TINY, "tiny"), _CHANGES, "tiny")
        run = runs.create(Path(directory) / "run", cfg)
        train(cfg, run, resume=False)
        agent = load_agent(run)
        newest = checkpoint.find_checkpoint(run)
        folder = DATA / stack()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(newest, folder / newest.name)
    observations = _observed(agent)
    arrays = {f"obs/{name}": values for name, values in observations.items()}
    np.savez_compressed(folder / ACTED, actions=act(agent, observations), **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
