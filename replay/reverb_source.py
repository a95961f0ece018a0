"""Windows from a Reverb server, one by one, put together to batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.types import ArraySpec, Batch
from replay import backend
from replay.table import IN_FLIGHT, Layout

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 3.0  # without a sign of life for this long, the server is asked whether it is alive
_MAX_RETRIES = 5  # errors in a row, from a server that answers, before the learner hears of them


class ReverbSource:
    """A `replay.sampler.Source`: batches of `batch_size` windows, uniformly drawn."""

    def __init__(
        self,
        address: str,
        signature: Mapping[str, ArraySpec],
        *,
        batch_size: int,
        batch_length: int,
        import_mode: backend.Mode = "lite",
    ):
        self.alive = True
        self._address = address
        self._client = backend.connect(address, import_mode)
        self._layout = Layout(signature)
        self._batch_size, self._batch_length = batch_size, batch_length
        self._sampler: Any = None
        self._last_sign = time.monotonic()  # of life from the server

    def read(self, closing: threading.Event) -> Batch | None:
        """See `replay.sampler.Source.read`."""
        columns = self._layout.empty(self._batch_size, self._batch_length)
        for row in range(self._batch_size):
            sample = self._read_sample(closing)
            if sample is None:
                return None
            for column, part in zip(columns, sample, strict=True):
                column[row] = part
        return self._layout.unpack(columns)

    def probe(self) -> None:
        """Asks the server after a long silence: its sampler raises nothing when it dies, and hangs."""
        if time.monotonic() - self._last_sign >= _PROBE_SECONDS:
            self._note(backend.server_answers(self._address))

    def end(self) -> None:
        """Ends the stream, so that the server draws nothing more for us."""
        self._sampler = None

    def _note(self, alive: bool) -> None:
        if alive != self.alive:
            state = "answers again" if alive else "does not answer; learning waits for it"
            _log.warning("The replay server at %s %s.", self._address, state)
        self.alive = alive
        self._last_sign = time.monotonic()

    def _read_sample(self, closing: threading.Event) -> list[np.ndarray] | None:
        """The columns of one window [L, ...]; a sampler that failed is replaced while the server lives."""
        failures = 0
        while not closing.is_set():
            try:
                if self._sampler is None:
                    self._sampler = backend.trajectory_sampler(self._client, IN_FLIGHT)
                sample = self._sampler.GetNextTrajectory()
                self._note(alive=True)
                return sample[-self._layout.num_columns :]
            except RuntimeError as error:
                self._sampler = None
                failures += 1
                if failures > _MAX_RETRIES and backend.server_answers(self._address):
                    raise
                _log.warning(
                    "Sampling from the replay server at %s failed (%s); trying again.", self._address, error
                )
                closing.wait(min(0.1 * 2**failures, 3.0))
        return None
