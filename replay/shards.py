"""Batches from several replay servers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from common.types import Batch
from replay.sampler import BatchSampler, Source

_POLL_SECONDS = 0.001


class Sampler(Protocol):
    """Gives batches [B, L, ...]."""

    def next(self, timeout: float) -> Batch | None:
        """The next batch, or None if none comes within `timeout` seconds."""
        ...

    def close(self) -> None: ...


def batches(sources: Sequence[Source]) -> Sampler:
    """Batches that hold equal parts of every source."""
    parts = [BatchSampler(source) for source in sources]
    return parts[0] if len(parts) == 1 else ShardedSampler(parts)


class ShardedSampler:
    """Puts batches together from equal parts of several samplers, in turn.

    A part that is not there yet is taken from the next sampler that has one: a server that is down, or
    whose actors are slow, holds nobody up. Each server's own rate limiter keeps the shares even.
    """

    def __init__(self, samplers: Sequence[BatchSampler]):
        self._samplers = samplers
        self._turn = 0
        self._parts: list[Batch] = []  # of the batch to come

    def next(self, timeout: float) -> Batch | None:
        """See `BatchSampler.next`. Parts that came in time are kept for the next call."""
        deadline = time.monotonic() + timeout
        while len(self._parts) < len(self._samplers):
            part = self._part(deadline)
            if part is None:
                return None
            self._parts.append(part)
        parts, self._parts = self._parts, []
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        for sampler in self._samplers:
            sampler.close()

    def _part(self, deadline: float) -> Batch | None:
        while True:
            late = time.monotonic() >= deadline
            for shard in [*range(self._turn, len(self._samplers)), *range(self._turn)]:
                sampler = self._samplers[shard]
                # Asking in vain takes a look at the server, which may last a second.
                part = sampler.next(0) if late or sampler.ready() else None
                if part is not None:
                    self._turn = (shard + 1) % len(self._samplers)
                    return part
            if late:
                return None
            time.sleep(_POLL_SECONDS)
