"""Batches from a table in memory."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

from common.types import ArraySpec, Batch
from replay.memory import frames
from replay.memory.frames import Frames
from replay.memory.link import Link
from replay.memory.table import Columns, Gone
from replay.table import Layout, step_bytes

_log = logging.getLogger(__name__)

_DRAW_SECONDS = 0.5  # of one question; between two of them `closing` is looked at
_RETRY_SECONDS = 0.5  # between two looks for a replay that is gone
_CALL_BYTES = 4_000_000  # of batches that one call fetches, if it may fetch several


class MemorySource:
    """A `replay.sampler.Source`: batches of `batch_size` windows, uniformly drawn."""

    def __init__(self, link: Link, signature: Mapping[str, ArraySpec], *, batch_size: int, batch_length: int):
        self.alive = True
        self._link, self._layout = link, Layout(signature)
        self._size, self._length = batch_size, batch_length
        batch = step_bytes(signature) * batch_size * batch_length
        self._at_most = max(1, min(link.batches, _CALL_BYTES // batch))
        self._batches: deque[Batch] = deque()

    def read(self, closing: threading.Event) -> Batch | None:
        """See `replay.sampler.Source.read`."""
        while not self._batches and not closing.is_set():
            try:
                count, columns = self._link.draw(self._size, self._at_most, _DRAW_SECONDS)
            except Gone as error:
                self._note(alive=False, why=str(error))
                closing.wait(_RETRY_SECONDS)
                continue
            self._note(alive=True)
            if count:
                self._batches.extend(self._unpacked(count, columns))
        return self._batches.popleft() if self._batches and not closing.is_set() else None

    def probe(self) -> None:
        """Nothing to do: every question is answered, or known to have failed, within seconds."""

    def end(self) -> None:
        """Nothing is held at the other end."""
        self._batches.clear()

    def _note(self, alive: bool, why: str = "") -> None:
        if alive != self.alive:
            state = "is back" if alive else f"is gone ({why}); learning waits for it"
            _log.warning("The replay %s.", state)
        self.alive = alive

    def _unpacked(self, count: int, columns: Columns) -> list[Batch]:
        arrays = [
            self._decompressed(column, spec) if isinstance(column, Frames) else column
            for column, spec in zip(columns, self._layout.columns, strict=True)
        ]
        fields = self._layout.unpack(arrays)
        rows = [slice(at * self._size, (at + 1) * self._size) for at in range(count)]
        return [{name: values[part] for name, values in fields.items()} for part in rows]

    def _decompressed(self, packed: Frames, spec: ArraySpec) -> np.ndarray:
        """As an array [windows, L, ...]."""
        out = np.empty((len(packed.sizes) // self._length, self._length, *spec.shape), spec.dtype)
        frames.decompress(packed, out.reshape(-1, *spec.shape))
        return out
