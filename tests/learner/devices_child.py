"""Trains on one and on four devices in a process that has four, see test_devices.py. Prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.configuration import merge
from common.types import UserError
from learner.cost_model import learned_cost
from learner.lagrange import augmented
from learner.learner import Learner
from learner.placement import place
from learner.train_step import Shared, TrainStep
from tests.learner.test_train_step import AUGMENTED
from tests.learner.tiny import CONFIG, SPEC, batch

UPDATES = 3


def learner(devices: int, precision: str = "float32") -> Learner:
    sizes = {"batch_size": 4, "batch_length": 4, "publish_every": 1}
    cfg = merge(CONFIG, {"learner": sizes | {"devices": devices, "precision": precision}}, "test")
    train = TrainStep(
        SPEC,
        cfg,
        augmented(AUGMENTED, cost_limit=2.0),
        learned_cost,
        learn_cost=True,
        value_cost=True,
        shared=Shared(False, False),
    )
    return Learner(train, lambda _: None, lambda *_: None, Path())


def wide(seed: int) -> dict[str, np.ndarray]:
    """Four windows out of two batches of two."""
    halves = [batch(seed), batch(seed + 100)]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def off(a: Any, b: Any) -> float:
    """Largest difference, relative to the size of each array."""
    return max(
        float(np.abs(x - y).max() / (np.abs(x).max() + 1e-6))
        for x, y in zip(numbers(a), numbers(b), strict=True)
    )


def numbers(tree: Any) -> Iterator[np.ndarray]:
    return (np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if np.size(x))


def refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def main(directory: str) -> None:
    one, four = learner(1), learner(4)
    for each in (one, four):
        each.compile()
        for seed in range(UPDATES):
            each._update(wide(seed))
    metrics = [each._read_metrics() for each in (one, four)]
    four.save(Path(directory), {"env_steps": 1})
    taken_over = learner(1)
    taken_over.restore(Path(directory))
    rounded = [learner(1, "bfloat16"), learner(4, "bfloat16")]
    for each in rounded:
        each.compile()
        each._update(wide(0))
    losses = [each._read_metrics() for each in rounded]
    rounded[0].restore(Path(directory))
    reward = jax.device_put(wide(0)["reward"], four._place.batch)
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "windows on each": [shard.data.shape[0] for shard in reward.addressable_shards],
                "metrics": off(*({k: np.float32(v) for k, v in m.items()} for m in metrics)),
                "model": off(one._state.model, four._state.model),
                "optimizer": off(one._state.model_opt, four._state.model_opt),
                "actor": off(one._state.actor, four._state.actor),
                "critic": off(one._state.critic, four._state.critic),
                "restored": off(four._state.model, taken_over._state.model),
                "bfloat16": off(*({k: np.float32(m[k]) for k in m if k[:5] == "loss/"} for m in losses)),
                "restored in bfloat16": off(four._state.model, rounded[0]._state.model),
                "uneven": refusal(lambda: place(4, 6)),
                "restored on": len(taken_over._state.updates.sharding.device_set),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
