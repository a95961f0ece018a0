"""Checkpoints as the SafeDreamer authors write them, made from the recorded variables of tests/parity."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from tests.parity import recorded

STEP = 1234
_OPTIMIZERS = {  # scope of an optimizer's name -> scope of what it trains
    "agent/wm/model_opt": "agent/wm/",
    "agent/task_behavior/ac/actor_opt": "agent/task_behavior/ac/actor/",
    "agent/task_behavior/safe_ac/actor_opt": "agent/task_behavior/safe_ac/actor/",
    "agent/task_behavior/critic/critic_opt": "agent/task_behavior/critic/net/",
    "agent/task_behavior/cost_critic/critic_opt": "agent/task_behavior/cost_critic/net/",
}


def variables(method: str) -> dict[str, np.ndarray]:
    """The recorded variables of a method; `dreamerv3` and `osrp` are made of those of related ones."""
    source = {"osrp": "osrp_lag", "dreamerv3": "bsrp_lag"}.get(method, method)
    found = recorded.group(recorded.read(source), "var")
    if method != "dreamerv3":
        return found
    unsafe = {name: x for name, x in found.items() if not any(part in name for part in ("cost", "lagrange"))}
    return {name.replace("/safe_ac/", "/ac/"): x for name, x in unsafe.items()}


def content(method: str, count: int = 7) -> dict[str, Any]:
    """What a checkpoint of a method holds. The moments are made up: all different, squares positive."""
    agent: dict[str, Any] = dict(variables(method))
    for name, scope in _OPTIMIZERS.items():
        trained = {
            key: x
            for key, x in variables(method).items()
            if key.startswith(scope) and x.dtype.kind == "f" and "_opt/" not in key
        }
        if f"{name}/step/value" in agent:
            mu = {key: (0.5 * x).astype(np.float32) for key, x in trained.items()}
            nu = {key: np.square(x).astype(np.float32) for key, x in trained.items()}
            adam = optax.ScaleByAdamState(np.asarray(count, np.int32), mu, nu)  # pyright: ignore
            agent[f"{name}/state"] = (optax.EmptyState(), adam, optax.EmptyState())
    return {"step": STEP, "agent": agent, "train_replay": None, "eval_replay": None, "_timestamp": 1.8e9}


def write(path: Path, method: str, change: Callable[[dict[str, Any]], Any] = lambda agent: None) -> Path:
    """Writes the checkpoint of a method, after `change` has had its way with its variables."""
    whole = content(method)
    change(whole["agent"])
    path.write_bytes(pickle.dumps(whole, protocol=4))
    return path
