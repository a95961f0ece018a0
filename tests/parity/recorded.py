"""Quantities recorded from the published implementation, and our system with its variables.

`tests/parity/data` holds the arrays (see make_data.py), by the names that the published code's recording gave
them: `var/*` variables, `data/*` a batch, and what was computed from both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import Config
from common.configuration import load, merge
from common.types import ArraySpec, Batch, EnvSpec
from deploy import wiring
from learner.distributions import OneHot
from learner.reference_variables import assign
from learner.rssm import Latent
from learner.train_step import TrainState, TrainStep

Recorded = Mapping[str, np.ndarray]

DATA = Path(__file__).parent / "data"
INIT_FIELDS = ("mean", "std", "min", "max")  # of initial variables, in `init/*`

_LONG, _STRIDE = 4096, 17

# What the recording made smaller; all else is as in the method's preset.
_SMALL = {
    "world_model": {
        "deter": 32,
        "units": 16,
        "stoch": 4,
        "classes": 4,
        "encoder_layers": 2,
        "encoder_units": 16,
        "cnn_depth": 8,
    },
    "behavior": {"units": 16, "horizon": 5},
    "planner": {"samples": 32, "elites": 8, "horizon": 5, "iterations": 3},
}
_PROPOSALS = {"osrp_vector": 0.25}  # planner.mixture_coef

_IMAGE = ArraySpec((64, 64, 3), "uint8")
_VISION = {"image": _IMAGE, "image2": _IMAGE}
_OBS = {"osrp_vector": {"vector": ArraySpec((29,))}, "osrp_lag": _VISION, "bsrp_lag": _VISION}
_SLICES = {"hazards": (9, 25)}


@dataclasses.dataclass(frozen=True)
class System:
    """A method with the recorded variables in it."""

    cfg: Config
    spec: EnvSpec
    train: TrainStep
    state: TrainState
    recorded: Recorded

    @property
    def batch(self) -> Batch:
        batch = self.group("data")
        return {("vector" if name == "observation" else name): x for name, x in batch.items()}

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """All arrays below a name, by the rest of their names."""
        return group(self.recorded, prefix)


def latents(recorded: Recorded, deter: str, stoch: str) -> Latent:
    """Two recorded arrays as latents."""
    return Latent(jnp.asarray(recorded[deter]), jnp.asarray(recorded[stoch]))


def group(recorded: Recorded, prefix: str) -> dict[str, np.ndarray]:
    """All arrays below a name, by the rest of their names."""
    start = len(prefix) + 1
    return {key[start:]: x for key, x in recorded.items() if key.startswith(prefix + "/")}


def thinned(x: np.ndarray) -> np.ndarray:
    """The array, or every 17th number of a long one."""
    return x if x.size <= _LONG else x.reshape(-1)[::_STRIDE]


def read(method: str) -> dict[str, np.ndarray]:
    """Everything that is kept of a method's recording."""
    names = ["bsrp_lag", "osrp_lag"] if method == "osrp_lag" else [method]
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        with np.load(DATA / f"{name}.npz") as file:
            arrays |= {key: file[key] for key in file.files}
    if method == "osrp_lag":
        arrays = {key: x for key, x in arrays.items() if not _only_augmented(key)}
    return arrays


def _only_augmented(key: str) -> bool:
    """What the actor's augmented Lagrangian has and the planner's PID has not."""
    return "safe_ac/lagrange" in key or "safe_ac/costnorm" in key


def system(method: str) -> System:
    """A method's preset at the recording's sizes, with the recorded variables."""
    recorded = read(method)
    cfg = merge(load(method, "paper", "SafetyPointGoal1-v0"), _SMALL, "recording")
    cfg = merge(cfg, {"planner": {"mixture_coef": _PROPOSALS.get(method, 0.0)}}, "recording")
    spec = EnvSpec("Recorded-v0", _OBS[method], 2, cfg.env.action_repeat, 1000, _SLICES)
    train = wiring.train_step(cfg, spec)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: train.init(0)))
    return System(cfg, spec, train, assign(group(recorded, "var"), state), recorded)


# --- pinned randomness --------------------------------------------------------------------------


def sines(count: int, actions: int) -> jax.Array:
    """The actor's recorded noise, [count, actions]: sin 0, sin 1, ..."""
    return jnp.asarray(np.sin(np.arange(count * actions, dtype=np.float32)).reshape(count, actions))


def _normal(key: Any, shape: tuple[int, ...] = (), dtype: Any = None) -> jax.Array:
    return jnp.broadcast_to(sines(*shape[-2:]), shape)


def _mode(one_hot: OneHot, uniform: Any) -> jax.Array:
    return jnp.argmax(one_hot.probs, -1)


@contextmanager
def pinned(normal: Callable = _normal) -> Iterator[pytest.MonkeyPatch]:
    """While tracing: one-hot draws are the mode, normal noise is recorded noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneHot, "classes_with", _mode)
        patch.setattr(jax.random, "normal", normal)
        yield patch


def pin(function: Callable, normal: Callable = _normal) -> Callable:
    """The function, compiled with pinned randomness."""

    def traced(*args: Any) -> Any:
        with pinned(normal):
            return function(*args)

    return jax.jit(traced)


# --- comparison ---------------------------------------------------------------------------------

TOLERANCE = 1e-5

# A two-hot mean is a sum of p * bin in which bins up to 20 cancel each other: what it and everything made
# of it (returns, advantages) can be exact to is a number of order one.
BINS = 1.0


def assert_close(
    ours: Any, theirs: Any, *, tolerance: float = TOLERANCE, terms: float = 0.0, name: str = ""
) -> None:
    """|ours - theirs| <= tolerance (|theirs| + rms(theirs)); ours is thinned as the recording is.

    A float32 sum has an error relative to its terms, not to what cancels out of them: so a number near
    zero may differ by as much as a typical number of its array.

    Args:
        terms: size of the summed terms, where it is more than what the array's numbers show.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    ours = thinned(ours) if ours.shape != theirs.shape else ours
    assert ours.shape == theirs.shape, f"{name}: {ours.shape} and {theirs.shape}"
    scale = max(terms, float(np.sqrt(np.square(theirs, dtype=np.float64).mean())))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, err_msg=name)
