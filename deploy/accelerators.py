"""Which part of a run computes on which share of the GPUs."""

from __future__ import annotations

from typing import NamedTuple

from common.types import UserError

# Processes that share a card take memory as they need it, instead of most of it at once.
SHARED_CARD = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Shares(NamedTuple):
    """GPUs per part; a part without any computes on the CPU."""

    learner: float
    inference: float = 0
    evaluator: float = 0


def shares(there: int, devices: int, central: bool) -> Shares:
    """The parts of `there` GPUs.

    The learner takes `devices` of them (0: all that it can have). Where one server decides for all actors,
    it and the evaluator, which decides for itself, get a card of their own if there is one to spare, else a
    share of the only one.

    Raises:
        UserError: the learner alone was given all of several cards.
    """
    learner = min(devices or there, there)
    if not central or there == 0:
        return Shares(learner)
    if learner < there:
        return Shares(learner, 0.6, 0.4)
    if there == 1:
        return Shares(0.4, 0.4, 0.2)
    if devices == 0:
        return Shares(there - 1, 0.6, 0.4)
    raise UserError(
        f"learner.devices {devices} leaves no GPU to the inference server: use --learner.devices "
        f"{there - 1}, or --inference.mode local"
    )
