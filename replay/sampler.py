"""Reads batches from replay in a thread of its own, ahead of the learner."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from common.types import ArraySpec, Batch
from replay import backend
from replay.table import IN_FLIGHT, PREFETCH, Layout

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 3.0  # without a batch for this long, the server is asked whether it is alive
_MAX_RETRIES = 5  # errors in a row, from a server that answers, before the learner hears of them
_END = object()  # queued behind the last batch


class BatchSampler:
    """Batches of `batch_size` windows, uniformly drawn, ready before they are asked for.

    A batch is a dict of arrays [B, L, ...] in the order of their names; it belongs to the caller. With
    `transform` (deploy passes `jax.device_put`), applied to every batch in the thread, the copy to the
    device is prefetched too.

    `server_alive` tells a limiter that waits for actors (True) from a server that is gone (False);
    `batches` and `waited_seconds` count what `next` returned and how long it waited.
    """

    def __init__(
        self,
        address: str,
        signature: Mapping[str, ArraySpec],
        *,
        batch_size: int,
        batch_length: int,
        prefetch: int = PREFETCH,
        transform: Callable[[Batch], Any] | None = None,
        import_mode: backend.Mode = "lite",
    ):
        self.batches = 0
        self.waited_seconds = 0.0
        self.server_alive = True
        self._address = address
        self._client = backend.connect(address, import_mode)
        self._layout = Layout(signature)
        self._batch_size = batch_size
        self._batch_length = batch_length
        self._transform = transform
        self._ready: queue.Queue[Any] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._sampler: Any = None
        self._last_sign = time.monotonic()  # of life from the server
        # Reverb offers no way to interrupt a blocked sampler: a daemon is left behind rather than waited for.
        self._thread = threading.Thread(target=self._run, name="replay-sampler", daemon=True)
        self._thread.start()

    def next(self, timeout: float | None = None) -> Any | None:
        """The next batch, or None if none comes within `timeout` seconds (None: for ever, 0: do not wait).

        Raises what went wrong in the thread, and RuntimeError after `close()`.
        """
        started = time.monotonic()
        deadline = float("inf") if timeout is None else started + timeout
        try:
            while True:
                if self._error is not None:
                    raise self._error
                if self._closing.is_set():
                    raise RuntimeError("The sampler is closed.")
                try:
                    remaining = min(deadline - time.monotonic(), _PROBE_SECONDS)
                    batch = self._ready.get(timeout=remaining) if remaining > 0 else self._ready.get_nowait()
                except queue.Empty:
                    self._probe()
                    if time.monotonic() >= deadline:
                        return None
                    continue
                if batch is not _END:
                    self.batches += 1
                    return batch
        finally:
            self.waited_seconds += time.monotonic() - started

    def ready(self) -> bool:
        """Whether `next` would return (or raise) at once."""
        return not self._ready.empty() or self._error is not None

    def close(self) -> None:
        """Stops the thread; one that is blocked inside Reverb is left behind until its next sample."""
        self._closing.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join(timeout=0.5)

    def _probe(self) -> None:
        if time.monotonic() - self._last_sign < _PROBE_SECONDS:
            return
        self._note(backend.server_answers(self._address))

    def _note(self, alive: bool) -> None:
        if alive != self.server_alive:
            state = "answers again" if alive else "does not answer; learning waits for it"
            _log.warning("The replay server at %s %s.", self._address, state)
        self.server_alive = alive
        self._last_sign = time.monotonic()

    def _run(self) -> None:
        try:
            while (batch := self._read_batch()) is not None:
                self._put(batch if self._transform is None else self._transform(batch))
        except BaseException as error:  # handed to the thread that calls next()
            self._error = error
            self._put(_END)
        self._sampler = None  # ends the stream, so that the server draws nothing more for us

    def _read_batch(self) -> Batch | None:
        """The next batch, or None after `close()`."""
        columns = self._layout.empty(self._batch_size, self._batch_length)
        for row in range(self._batch_size):
            sample = self._read_sample()
            if sample is None:
                return None
            for column, part in zip(columns, sample, strict=True):
                column[row] = part
        return self._layout.unpack(columns)

    def _read_sample(self) -> list[np.ndarray] | None:
        """The columns of one window [L, ...]; a sampler that failed is replaced while the server lives."""
        failures = 0
        while not self._closing.is_set():
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
                self._closing.wait(min(0.1 * 2**failures, 3.0))
        return None

    def _put(self, entry: Any) -> None:
        while not self._closing.is_set():
            try:
                return self._ready.put(entry, timeout=0.2)
            except queue.Full:
                continue
