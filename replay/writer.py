"""Streams the steps of one environment into replay, as overlapping windows."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from common.config import ReplayConfig
from common.types import ArraySpec
from replay import backend
from replay.table import Layout, chunk_length

_log = logging.getLogger(__name__)

_FLUSH_MS = 50  # how long a blocked append sleeps before it asks `should_stop` again
_PROBE_SECONDS = 3.0  # a blocked append asks this often whether the server is alive
_MAX_REOPENS = 5  # times in a row that a server which answers may refuse the stream


def _never() -> bool:
    return False


class StreamWriter:
    """A `common.types.Writer`: the continuous stream of ONE environment, across episode ends.

    Every `cfg.stride` steps the last `batch_length` steps become an item. Acting is held up only while
    more than two chunks of items wait for the server: the rate limiter at work, or a server that is
    down. Both are waited for while `should_stop()` is false; it ends the wait, not the stream. A thread
    that also learns must pass `BatchSampler.ready` (or a deadline), else it waits for itself for ever.

    Counters: `appended` steps, `items` created, `items_lost` of them, `waited_seconds`.
    Not thread-safe; the writers of one process share a client.
    """

    def __init__(
        self,
        address: str,
        signature: Mapping[str, ArraySpec],
        cfg: ReplayConfig,
        batch_length: int,
        *,
        should_stop: Callable[[], bool] = _never,
    ):
        self.appended = 0
        self.items = 0
        self.items_lost = 0
        self.waited_seconds = 0.0
        self._address = address
        self._layout = Layout(signature)
        self._length = batch_length
        self._stride = cfg.stride
        self._should_stop = should_stop
        self._client = backend.connect(address, cfg.import_mode)
        # A window waits until its last chunk is full: one such chunk of items is always pending.
        self._chunk = chunk_length(batch_length)
        self._max_pending = 2 * -(-self._chunk // cfg.stride)
        self._closed = False
        self._held = False  # by the limiter, or a server that is down, when the last wait was cut short
        self._reopens = 0
        self._open()

    def admit(self) -> bool:
        """Waits, until `should_stop()`, for what holds this writer back; whether nothing does any more."""
        if self._held:
            self._wait(self._max_pending)
        return not self._held

    def append(self, step: Mapping[str, Any]) -> None:
        """Appends one step (keys, shapes and dtypes as in `replay_spec`), and a window when one is due.

        Blocks while the limiter holds inserts back, or the server is down, until `should_stop()`.
        Raises ValueError when the first step does not fit the signature, RuntimeError when a server
        that answers keeps refusing the stream.
        """
        if self.appended == 0:
            self._layout.check(step)
        columns = self._layout.pack(step)
        while True:
            try:
                created = self._append(columns)
                break
            except RuntimeError as error:  # the stream is broken for good; a new one starts with this step
                self._reopen(error)
        self.appended += 1
        if created:  # asking costs several times more than appending
            self._wait(self._max_pending)

    def close(self, timeout: float = 2.0) -> None:
        """Sends what is buffered and ends the stream.

        What the server does not take within `timeout` seconds (0.1, if `should_stop()`) is lost.
        """
        if self._closed:
            return
        self._closed = True
        self._wait(0, time.monotonic() + (min(timeout, 0.1) if self._should_stop() else timeout))
        self._writer.Close()

    def _open(self) -> None:
        self._writer = backend.trajectory_writer(self._client, self._chunk, self._length)
        self._windows = [deque(maxlen=self._length) for _ in range(self._layout.num_columns)]
        self._steps = 0  # in this stream
        self._stream_items = 0

    def _append(self, columns: list) -> bool:
        """Whether a window was due with this step."""
        for window, reference in zip(self._windows, self._writer.Append(columns), strict=True):
            window.append(reference)
        self._steps += 1
        beyond = self._steps - self._length
        if beyond < 0 or beyond % self._stride:
            return False
        self._writer.CreateItem(
            backend.TABLE, 1.0, [list(w) for w in self._windows], [False] * len(self._windows)
        )
        self.items += 1
        self._stream_items += 1
        return True

    def _wait(self, pending: int, deadline: float = math.inf) -> None:
        """Returns when at most `pending` items are unconfirmed, at the deadline, or on `should_stop()`.

        With a deadline, `should_stop` is ignored and what is then still unconfirmed counts as lost.
        """
        started = probed = time.monotonic()
        answers, self._held = True, False
        patience = 1  # ms; 0 would mean for ever
        while True:
            try:
                self._writer.Flush(pending, patience)
                if self._stream_items > pending:  # this stream has had an item confirmed
                    self._reopens = 0
                break
            except RuntimeError as error:
                if "Timeout exceeded" not in str(error):
                    self._reopen(error)
                    break
                now = time.monotonic()
                if now >= deadline:
                    self._lose(sum(map(int, re.findall(r"(\d+) items", str(error)))), logging.INFO)
                    break
                if deadline == math.inf and self._should_stop():
                    self._held = True
                    break
                patience = _FLUSH_MS
                if answers and now - probed >= _PROBE_SECONDS:
                    probed = now
                    answers = backend.server_answers(self._address)
                    if not answers:
                        _log.warning(
                            "Acting waits for the replay server at %s, which is gone.", self._address
                        )
        self.waited_seconds += time.monotonic() - started
        if not answers:
            _log.warning("Acting goes on (replay server at %s).", self._address)

    def _reopen(self, error: RuntimeError) -> None:
        """Starts a new stream after an error that Reverb's writer does not recover from."""
        self._reopens += 1
        if self._reopens > _MAX_REOPENS and backend.server_answers(self._address):
            raise RuntimeError(f"The replay server at {self._address} refuses the stream: {error}") from error
        _log.warning(
            "The stream to the replay server at %s broke: %s; opening a new one.", self._address, error
        )
        # Reverb does not tell how many items were on their way: at most these.
        self._lose(min(self._stream_items, self._max_pending), logging.WARNING)
        self._writer.Close()
        self._open()
        resume = time.monotonic() + min(0.1 * 2**self._reopens, 3.0)
        while time.monotonic() < resume and not self._should_stop():
            time.sleep(0.05)

    def _lose(self, items: int, level: int) -> None:
        self.items_lost += items
        if items:
            _log.log(level, "Replay lost %d windows on their way to %s.", items, self._address)
