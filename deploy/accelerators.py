"""Which part of a run computes on which share of the GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from common.types import UserError


class Shares(NamedTuple):
    """GPUs per part; a part without any computes on the CPU."""

    learner: float
    inference: float = 0
    evaluator: float = 0


def shares(there: int, devices: int, central: bool, most: int | None = None) -> Shares:
    """How the parts of a run divide GPUs.

    The learner takes `devices` of them (0: all that it can have). Where one server decides for all actors,
    it and the evaluator, which decides for itself, get a card of their own if there is one to spare, else a
    share of the only one.

    Args:
        there: GPUs in all.
        most: GPUs that the learner can have, for it lives on one node; default: all.

    Raises:
        UserError: the learner alone was given all of several cards.
    """
    most = there if most is None else most
    learner = min(devices or most, most)
    if not central or there == 0:
        return Shares(learner)
    if learner < there:
        return Shares(learner, 0.6, 0.4)
    if there == 1:
        return Shares(0.4, 0.4, 0.2)
    if devices == 0:
        return Shares(learner - 1, 0.6, 0.4)
    raise UserError(
        f"learner.devices {devices} leaves no GPU to the inference server: use --learner.devices "
        f"{there - 1}, or --inference.mode local"
    )


def card(place: Mapping[str, Any]) -> dict[str, str]:
    """Environment of a process with these `num_gpus`: who shares a card takes memory as it needs it."""
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if 0 < place.get("num_gpus", 0) < 1 else {}
