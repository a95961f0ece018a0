"""Sizes and kind of a published agent, as the names and shapes of its variables tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.types import UserError

_BEHAVIOR = "agent/task_behavior"
_LAGRANGE = f"{_BEHAVIOR}/safe_ac/lagrange/"
_SAFE = f"{_BEHAVIOR}/safe_ac/"
_ENCODER = "agent/wm/enc"

Variables = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """What the shapes tell. `latent` is the number of categoricals times their classes."""

    settings: dict[str, Any]  # as the configuration has them: {"world_model": {...}, "behavior": {...}}
    latent: int
    actions: int
    vector: int  # numbers in the state observation; 0 for none
    channels: int  # of all images together; 0 for none
    side: int  # of an image, in pixels; 0 for none


def methods(variables: Variables) -> tuple[str, ...]:
    """The methods of whose kind an agent is.

    The multiplier of OSRP-Lag is not saved, nor do planners leave a trace: such methods share a kind.
    """
    if any(name.startswith(_LAGRANGE) for name in variables):
        return ("bsrp_lag",)
    if any(name.startswith(_SAFE) for name in variables):
        return ("osrp", "osrp_lag")
    if _rows(variables, f"{_ENCODER}/mlp/h0/kernel"):
        return ("osrp_vector", "dreamerv3")
    return ("dreamerv3",)


def sizes(variables: Variables) -> Sizes:
    """Infers the sizes. Raises UserError when a variable that tells one is missing or of another rank."""
    flat, units = _shape(variables, "agent/wm/rssm/img_stats/kernel", 2)[::-1]
    inputs, _ = _shape(variables, "agent/wm/rssm/img_in/kernel", 2)
    if inputs <= flat:
        raise UserError(
            f"the published layer agent/wm/rssm/img_in leaves no room for actions: {inputs} inputs"
        )
    actor = f"{_SAFE}actor" if f"{_SAFE}actor/h0/kernel" in variables else f"{_BEHAVIOR}/ac/actor"
    model = {
        "deter": _shape(variables, "agent/wm/rssm/initial", 1)[0],
        "units": units,
        "head_layers": _layers(variables, "agent/wm/rew"),
        "bins": _shape(variables, "agent/wm/rew/dist_out/out/bias", 1)[0],
    }
    vector = _rows(variables, f"{_ENCODER}/mlp/h0/kernel")
    if vector:
        model["encoder_layers"] = _layers(variables, f"{_ENCODER}/mlp")
        model["encoder_units"] = _shape(variables, f"{_ENCODER}/mlp/h0/kernel", 2)[1]
    channels = side = 0
    if f"{_ENCODER}/cnn/s0res/kernel" in variables:
        *_, channels, model["cnn_depth"] = _shape(variables, f"{_ENCODER}/cnn/s0res/kernel", 4)
        stages = sum(f"{_ENCODER}/cnn/s{i}res/kernel" in variables for i in range(16))
        side = 4 * 2**stages  # every convolution halves the image, down to 4 x 4
    if not vector and not channels:
        raise UserError(f"the published agent observes nothing: it has no variables in {_ENCODER}")
    behavior = {"layers": _layers(variables, actor), "units": _shape(variables, f"{actor}/h0/kernel", 2)[1]}
    return Sizes({"world_model": model, "behavior": behavior}, flat, inputs - flat, vector, channels, side)


def _shape(variables: Variables, name: str, rank: int) -> tuple[int, ...]:
    if name not in variables:
        raise UserError(f"the published variable {name} is missing; this is no SafeDreamer agent")
    if variables[name].ndim != rank:
        raise UserError(f"the published variable {name} has the shape {variables[name].shape}")
    return variables[name].shape


def _rows(variables: Variables, name: str) -> int:
    """Inputs of a layer; 0 where there is none."""
    return _shape(variables, name, 2)[0] if name in variables else 0


def _layers(variables: Variables, scope: str) -> int:
    """Hidden layers h0, h1, ... of a network."""
    count = 0
    while f"{scope}/h{count}/kernel" in variables:
        count += 1
    return count
