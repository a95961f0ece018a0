"""How one step is laid out in replay, and the numbers that define the table. Pure, without Reverb.

Items cost more memory than vector steps do: Reverb keeps a record per item, column and chunk. All
small arrays of a step therefore travel as one row of bytes; only images get columns of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import ReplayConfig
from common.types import ArraySpec, Batch, UserError

PREFETCH = 2  # batches that a sampler keeps ready, and that count as sampled
IN_FLIGHT = 16  # single samples that Reverb's client keeps on their way
CHUNK_LENGTH = 16  # steps compressed together; a window is visible once its last chunk is full

_SMALL_BYTES = 4096  # arrays up to this size share the packed row
# Upper bounds measured with Reverb 0.14: bytes beside the data itself.
_BYTES_PER_ITEM = 700
_BYTES_PER_SLICE = 120  # an item's reference to one chunk
_BYTES_PER_CHUNK = 600
_BYTES_PER_START = 8  # where a window begins, in a table in memory
_BYTES_OF_PROCESS = 100 * 2**20


class Layout:
    """Turns steps into Reverb columns and sampled columns into batches.

    Column 0 is the packed row (uint8), then come the big arrays in the order of their names.
    """

    def __init__(self, signature: Mapping[str, ArraySpec]):
        self.signature = dict(sorted(signature.items()))
        big = {name for name, spec in self.signature.items() if _nbytes(spec) > _SMALL_BYTES}
        self.big = sorted(big)
        self._row_dtype = np.dtype([(n, s.dtype, s.shape) for n, s in self.signature.items() if n not in big])
        self._small = list(self._row_dtype.names or ())
        self.num_columns = 1 + len(self.big)
        row = ArraySpec((self._row_dtype.itemsize,), "uint8")
        self.columns = [row, *(self.signature[name] for name in self.big)]

    def check(self, step: Mapping[str, Any]) -> None:
        """Raises ValueError unless names, shapes and dtypes of a step are those of the signature."""
        if step.keys() != self.signature.keys():
            missing, unknown = self.signature.keys() - step.keys(), step.keys() - self.signature.keys()
            raise ValueError(
                f"A replay step must hold {sorted(self.signature)}; "
                f"missing: {sorted(missing)}, unknown: {sorted(unknown)}."
            )
        for name, spec in self.signature.items():
            value = np.asarray(step[name])
            if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
                raise ValueError(
                    f"Replay stores {name!r} as {spec.dtype}{list(spec.shape)}, "
                    f"but the step holds {value.dtype}{list(value.shape)}."
                )

    def pack(self, step: Mapping[str, Any]) -> list[np.ndarray]:
        """One step as columns: uint8 [row bytes], then the big arrays."""
        row = np.zeros(1, self._row_dtype)
        for name in self._small:
            row[name] = step[name]
        return [row.view(np.uint8), *(step[name] for name in self.big)]

    def empty(self, batch_size: int, batch_length: int) -> list[np.ndarray]:
        """Uninitialised columns of a whole batch: [B, L, row bytes], then [B, L, ...] of the big arrays."""
        return [np.empty((batch_size, batch_length, *spec.shape), spec.dtype) for spec in self.columns]

    def fields(self, columns: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The columns' arrays [B, L, ...] by their names, as views: writing there writes the columns."""
        rows = columns[0].view(self._row_dtype)[..., 0]
        return {name: rows[name] for name in self._small} | dict(zip(self.big, columns[1:], strict=True))

    def unpack(self, columns: list[np.ndarray]) -> Batch:
        """The columns of a batch as a dict of contiguous arrays [B, L, ...], in the order of their names."""
        fields = self.fields(columns)
        return {name: np.ascontiguousarray(fields[name]) for name in self.signature}


@dataclass(frozen=True)
class ReplayInfo:
    """State of a table; the counts survive a restore. Prefetched samples count as sampled."""

    size: int  # items that can be sampled
    inserted: int  # items
    sampled: int  # items


@dataclass(frozen=True)
class TableSpec:
    """Everything that defines the table; items are windows of `batch_length` steps."""

    signature: dict[str, ArraySpec]
    batch_length: int
    stride: int
    max_size: int  # items
    min_size: int  # items that must be there before anything is sampled
    samples_per_insert: float
    samples_ahead: float  # samples that may be drawn before the inserts that pay for them
    inserts_ahead: float  # inserts, counted in the samples they allow, that may wait to be replayed

    @property
    def error_range(self) -> tuple[float, float]:
        """Bounds of `inserts * samples_per_insert - samples` within which both sides may pass."""
        paid = self.min_size * self.samples_per_insert
        return paid - self.samples_ahead, paid + self.inserts_ahead


def chunk_length(batch_length: int) -> int:
    """Steps per chunk for windows of `batch_length` steps."""
    return min(batch_length, CHUNK_LENGTH)


def table_spec(
    signature: Mapping[str, ArraySpec],
    cfg: ReplayConfig,
    *,
    batch_length: int,
    train_ratio: float,
    batch_size: int,
    min_steps: int,
    streams: int = 1,
) -> TableSpec:
    """Derives the table from what a user chooses.

    Every item brings `stride` new steps and every sample replays `batch_length`, so a ratio of
    replayed to collected steps is samples_per_insert = train_ratio * stride / batch_length. The
    limiter opens as soon as `streams` writers have appended `min_steps` steps together, up to the chunk
    that is still being filled. Samplers may run ahead by what they prefetch, writers by one chunk each:
    wide enough that neither side can ever block the other for good.
    Raises UserError for a table that could never be sampled.
    """
    if cfg.stride < 1 or batch_length < 1 or train_ratio <= 0:
        raise UserError("replay.stride, learner.batch_length and learner.train_ratio must be above zero.")
    max_size = cfg.capacity // cfg.stride
    steps_per_stream = max(min_steps // streams, batch_length)
    min_size = streams * ((steps_per_stream - batch_length) // cfg.stride + 1)
    if min_size > max_size:
        needed = min_size * cfg.stride
        raise UserError(
            f"replay.capacity is {cfg.capacity} agent steps, but learning starts only after {needed} "
            f"(learner.prefill {min_steps}, {streams} environments, windows of {batch_length}): "
            f"raise replay.capacity to at least {needed}."
        )
    per_insert = train_ratio * cfg.stride / batch_length
    burst = streams * math.ceil(chunk_length(batch_length) / cfg.stride)
    return TableSpec(
        signature=dict(sorted(signature.items())),
        batch_length=batch_length,
        stride=cfg.stride,
        max_size=max_size,
        min_size=min_size,
        samples_per_insert=per_insert,
        samples_ahead=(PREFETCH + 1) * batch_size + 2 * IN_FLIGHT + max(1.0, per_insert),
        inserts_ahead=2 * max(1.0, per_insert) + burst * per_insert,
    )


def reverb_ceiling(signature: Mapping[str, ArraySpec], cfg: ReplayConfig, batch_length: int) -> int:
    """Bytes a Reverb server's process needs for a full table, were nothing compressed (an upper bound)."""
    columns = Layout(signature).num_columns
    chunk = chunk_length(batch_length)
    slices = math.ceil((batch_length - 1) / chunk) + 1  # a window rarely starts at a chunk's border
    steps = cfg.capacity + batch_length
    chunks = math.ceil(steps / chunk) * columns * _BYTES_PER_CHUNK
    items = cfg.capacity // cfg.stride * (_BYTES_PER_ITEM + columns * slices * _BYTES_PER_SLICE)
    return steps * step_bytes(signature) + chunks + items + _BYTES_OF_PROCESS


def memory_ceiling(signature: Mapping[str, ArraySpec], cfg: ReplayConfig, batch_length: int) -> int:
    """Bytes a full table in memory needs, were nothing compressed (an upper bound)."""
    return (cfg.capacity + batch_length) * (step_bytes(signature) + _BYTES_PER_START) + _BYTES_OF_PROCESS


def frames_bytes(signature: Mapping[str, ArraySpec], steps: int) -> int:
    """Bytes of the big arrays of so many steps."""
    return steps * sum(_nbytes(signature[name]) for name in Layout(signature).big)


def step_bytes(signature: Mapping[str, ArraySpec]) -> int:
    """Bytes of one step, not compressed."""
    return sum(map(_nbytes, signature.values()))


def _nbytes(spec: ArraySpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
