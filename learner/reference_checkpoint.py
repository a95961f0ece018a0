"""Reads the checkpoints that the SafeDreamer authors publish.

A plain pickle of `{step, agent: {name: array | optax state}, train_replay, eval_replay, _timestamp}`, read as
the hostile file that it may be: see `learner/inert_pickle.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.types import UserError
from learner.inert_pickle import Record, Refused, array_of, kind_of, load
from learner.reference_variables import AdamMoments

MAX_BYTES = 2 << 30  # the largest published file has 392 MB

_KEYS = {"step", "agent", "train_replay", "eval_replay", "_timestamp"}


class ReferenceCheckpoint(NamedTuple):
    """A published checkpoint. Its arrays are read-only views of the file as it was read."""

    step: int  # agent steps (decisions) taken in training
    variables: dict[str, np.ndarray]  # by their published names, without the optimisers' states
    optimizers: dict[str, AdamMoments]  # by their published names (`agent/wm/model_opt/state`)


def read(path: Path, max_bytes: int = MAX_BYTES) -> ReferenceCheckpoint:
    """Reads a published checkpoint; executes nothing that it says.

    Needs as much memory as the file is large.

    Raises:
        UserError: no file, too large, damaged, hostile, or not laid out as published.
    """
    data = _bytes_of(Path(path), max_bytes)
    try:
        return _checkpoint(load(data), max_bytes)
    except Refused as problem:
        raise UserError(f"{path} is not a published SafeDreamer checkpoint: {problem}") from None


def _bytes_of(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():  # neither a directory nor a pipe, which would be waited for
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; give the checkpoint.ckpt of a published run")
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{path} is larger than {max_bytes:,} bytes, so no published checkpoint")
        with path.open("rb") as file:
            data = file.read(size)  # no more than that, should it grow
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not data:
        raise UserError(f"{path} is empty; download it again")
    return data


def _checkpoint(content: Any, max_bytes: int) -> ReferenceCheckpoint:
    if type(content) is not dict:
        raise Refused(f"it holds a {kind_of(content)}, not a dict with `step` and `agent`")
    for key in ("step", "agent"):
        if key not in content:
            raise Refused(f"it has no `{key}`")
    for key in content:
        if key not in _KEYS:
            raise Refused(f"it has an entry {key[:80]!r} that published ones have not")
    step, agent = content["step"], content["agent"]
    if type(step) is not int or not 0 <= step < 2**53:
        raise Refused("`step` is no count")
    if type(agent) is not dict:
        raise Refused(f"`agent` is a {kind_of(agent)}, not a dict of variables")
    variables: dict[str, np.ndarray] = {}
    optimizers: dict[str, AdamMoments] = {}
    for name, value in agent.items():
        if array_of(value) is None and type(value) in (tuple, Record):
            optimizers[name] = _adam(name, value)
        else:
            variables[name] = _array(name, value)
    arrays = list(variables.items())
    for adam in optimizers.values():
        arrays += [*adam.mu.items(), *adam.nu.items()]
    # One stretch of the file may stand for many arrays: counted before any of them is looked at.
    if sum(array.nbytes for _, array in arrays) > max_bytes:
        raise Refused(f"its arrays take more than {max_bytes:,} bytes")
    for name, array in arrays:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Refused(f"{name[:80]!r} holds numbers that are not finite")
    for name, adam in optimizers.items():
        if any((array < 0).any() for array in adam.nu.values()):
            raise Refused(f"{name[:80]!r} holds squares that are negative")
    return ReferenceCheckpoint(step, variables, optimizers)


def _array(name: str, value: Any) -> np.ndarray:
    array = array_of(value)
    if array is None:
        raise Refused(f"{name[:80]!r} is a {kind_of(value)}, not an array or an optimizer's state")
    return array


def _adam(name: str, state: Any) -> AdamMoments:
    """The moments in `(EmptyState, ScaleByAdamState, EmptyState)`, which float16 runs wrap once more."""
    if type(state) is Record and state.name == "ApplyIfFiniteState":
        state = state.fields[-1]
    parts = state if type(state) is tuple else ()
    records = [part for part in parts if type(part) is Record]
    adams = [part for part in records if part.name == "ScaleByAdamState"]
    others = [part for part in records if part.name != "EmptyState"]
    if len(records) != len(parts) or len(adams) != 1 or others != adams:
        raise Refused(f"{name[:80]!r} is not the state of an Adam optimizer")
    count, mu, nu = adams[0].fields
    return AdamMoments(_count(name, count), _moments(name, mu), _moments(name, nu))


def _count(name: str, value: Any) -> int:
    array = array_of(value)
    if array is None or array.shape != () or array.dtype.kind not in "iu" or not 0 <= array < 2**31:
        raise Refused(f"{name[:80]!r} has no count of its steps")
    return int(array)


def _moments(name: str, value: Any) -> Mapping[str, np.ndarray]:
    if type(value) is not dict:
        raise Refused(f"{name[:80]!r} has a {kind_of(value)} for its moments, not a dict of arrays")
    return {key: _array(key, array) for key, array in value.items()}
