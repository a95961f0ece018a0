"""Reads batches from replay in a thread of its own, ahead of the learner."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from common.types import Batch
from replay.table import PREFETCH

_PROBE_SECONDS = 3.0  # without a batch for this long, the replay is asked whether it is alive
_END = object()  # queued behind the last batch


class Source(Protocol):
    """Where batches come from."""

    alive: bool  # whether the replay answers, as far as anybody knows

    def read(self, closing: threading.Event) -> Batch | None:
        """The next batch, or None once `closing` is set. Waits for it in the sampler's thread."""
        ...

    def probe(self) -> None:
        """Finds out whether the replay is alive, where `read` cannot tell. In the learner's thread."""
        ...

    def end(self) -> None:
        """Nothing is read any more."""
        ...


class BatchSampler:
    """Batches of a source, ready before they are asked for.

    A batch is a dict of arrays [B, L, ...] in the order of their names; it belongs to the caller. With
    `transform` (such as `jax.device_put`), applied to every batch in the thread, the copy to the
    device is prefetched too.

    `server_alive` tells a limiter that waits for actors (True) from a replay that is gone (False);
    `batches` and `waited_seconds` count what `next` returned and how long it waited.
    """

    def __init__(
        self,
        source: Source,
        *,
        prefetch: int = PREFETCH,
        transform: Callable[[Batch], Any] | None = None,
    ):
        self.batches = 0
        self.waited_seconds = 0.0
        self._source = source
        self._transform = transform
        self._ready: queue.Queue[Any] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        # Reverb offers no way to interrupt a blocked sampler: a daemon is left behind rather than waited for.
        self._thread = threading.Thread(target=self._run, name="replay-sampler", daemon=True)
        self._thread.start()

    @property
    def server_alive(self) -> bool:
        """Whether the replay answers, as far as anybody knows."""
        return self._source.alive

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
                    self._source.probe()
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

    def _run(self) -> None:
        try:
            while (batch := self._source.read(self._closing)) is not None:
                self._put(batch if self._transform is None else self._transform(batch))
        except BaseException as error:  # handed to the thread that calls next()
            self._error = error
            self._put(_END)
        self._source.end()

    def _put(self, entry: Any) -> None:
        while not self._closing.is_set():
            try:
                return self._ready.put(entry, timeout=0.2)
            except queue.Full:
                continue
