"""Streams the steps of several environments into a table in memory."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple

from common.config import ReplayConfig
from common.types import ArraySpec
from replay.memory import frames
from replay.memory.link import SILENT_SECONDS, Link
from replay.memory.table import Appended, Block, Gone
from replay.table import Layout, chunk_length

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05  # how long a blocked append waits before it asks `should_stop` again
_SETTLE_SECONDS = 0.1  # of one question to the limiter
_RETRY_SECONDS = 0.5  # between two looks for a replay that is gone
_MAX_UNSENT = 64  # blocks that are kept while the replay is gone; a block is a chunk of every stream


def _never() -> bool:
    return False


def stream_writers(
    link: Link,
    signature: Mapping[str, ArraySpec],
    cfg: ReplayConfig,
    batch_length: int,
    streams: Sequence[int],
    should_stop: Callable[[], bool] = _never,
) -> list[MemoryWriter]:
    """One `common.types.Writer` per stream, for environments that are stepped together.

    Their steps travel together, a chunk of each at a time: one call for hundreds of steps. For blocking,
    `should_stop` and the counters see `replay.writer.StreamWriter`. Not thread-safe.

    Args:
        streams: the numbers under which the table knows the environments; a later writer with the same
            number takes its place.
    """
    sender = _Sender(link, signature, cfg, batch_length, streams, should_stop)
    return [MemoryWriter(sender, row) for row in range(len(streams))]


class MemoryWriter:
    """The continuous stream of one environment, across episode ends."""

    def __init__(self, sender: _Sender, row: int):
        self.appended = 0
        self._sender, self._row = sender, row

    @property
    def items(self) -> int:
        """Windows that its steps have completed, as far as the table has confirmed them."""
        return self._sender.items[self._row]

    @property
    def items_lost(self) -> int:
        """Of them, how many never reached the table."""
        return self._sender.lost[self._row]

    @property
    def waited_seconds(self) -> float:
        """For the rate limiter or a replay that is gone."""
        return self._sender.waited[self._row]

    def admit(self) -> bool:
        """Waits, until `should_stop()`, for what holds its group back; whether nothing does any more."""
        return self._sender.admit(self._row)

    def append(self, step: Mapping[str, Any]) -> None:
        """Appends one step (keys, shapes and dtypes as in `replay_spec`).

        Blocks while the limiter holds windows back, or the replay is gone, until `should_stop()`.
        Raises ValueError when the first step does not fit the signature.
        """
        if not self.appended:
            self._sender.layout.check(step)
        self._sender.add(self._row, step)
        self.appended += 1

    def close(self, timeout: float = 2.0) -> None:
        """Sends what is buffered, of all streams of the group, and ends it.

        Waits `timeout` seconds (0.1, if `should_stop()`) for the limiter to let it in. What has not even
        reached the table then is lost; what waits there goes on waiting.
        """
        self._sender.close(timeout)


class _Sent(NamedTuple):
    """A block on its way."""

    block: Block
    answer: Future[Appended]
    at: float  # time.monotonic()

    def answered(self) -> Appended | None:
        """The answer, or None while it is not there. Raises Gone when it is long overdue."""
        try:
            return self.answer.result(_POLL_SECONDS)
        except FutureTimeout:
            if time.monotonic() - self.at > SILENT_SECONDS:
                raise Gone(f"no answer for {SILENT_SECONDS:.0f} s") from None
            return None


class _Sender:
    """What the writers of one process share: blocks on their way, in order."""

    def __init__(
        self,
        link: Link,
        signature: Mapping[str, ArraySpec],
        cfg: ReplayConfig,
        batch_length: int,
        streams: Sequence[int],
        should_stop: Callable[[], bool],
    ):
        self.layout = Layout(signature)
        self.items, self.lost = [0] * len(streams), [0] * len(streams)
        self.waited = [0.0] * len(streams)
        self._link, self._streams, self._should_stop = link, tuple(streams), should_stop
        self._compressed = cfg.compression == "lz4"
        self._stride, self._chunk = cfg.stride, chunk_length(batch_length)
        self._max_pending = 2 * -(-self._chunk // cfg.stride)
        self._unsent: deque[Block] = deque()
        self._sent: _Sent | None = None  # and not confirmed
        self._pending = [0] * len(streams)
        self._life = 0  # of the streams; 0 while there are none
        self._missed_at: float | None = None  # when the replay was found to be gone
        self._held = False  # when the last wait was cut short
        self._closed = False
        self._begin_block()

    def add(self, row: int, step: Mapping[str, Any]) -> None:
        """The next step of a stream; sends a block when it is full."""
        if self._filled[row] == self._chunk:  # the others are behind
            self._dispatch(row)
        at = self._filled[row]
        for name, values in self._fields.items():
            values[row, at] = step[name]
        for name, blocks in self._frames.items():
            blocks[row].append(frames.compress(step[name]))
        self._filled[row] = at + 1
        if at + 1 == self._chunk and min(self._filled) == self._chunk:
            self._dispatch(row)

    def admit(self, row: int) -> bool:
        """See `MemoryWriter.admit`; the time counts as waited by that stream."""
        if self._held:
            self._wait(row)
        return not self._held

    def close(self, timeout: float) -> None:
        """Sends what there is; counts what is not confirmed in time as lost."""
        if self._closed:
            return
        self._closed = True
        if any(self._filled):
            self._end_block()
        self._push(0, time.monotonic() + (min(timeout, 0.1) if self._should_stop() else timeout))
        if self._sent is not None:
            self._lose(self._sent.block)
        for block in self._unsent:
            self._lose(block)

    def _begin_block(self) -> None:
        """Arrays that nobody else has: a block may be on its way for long."""
        rows, self._filled = len(self._streams), [0] * len(self._streams)
        self._columns = self.layout.empty(rows, self._chunk)
        fields = self.layout.fields(self._columns)
        big = self.layout.big if self._compressed else ()
        self._fields = {name: values for name, values in fields.items() if name not in big}
        self._frames: dict[str, list[list[bytes]]] = {name: [[] for _ in range(rows)] for name in big}

    def _end_block(self) -> None:
        columns = [self._columns[0], *(self._frames.values() if self._compressed else self._columns[1:])]
        self._unsent.append(Block(self._streams, tuple(self._filled), tuple(columns)))
        self._begin_block()

    def _dispatch(self, row: int) -> None:
        self._end_block()
        self._wait(row)
        if len(self._unsent) > _MAX_UNSENT:
            self._break_stream("too much waits for it")
            self._lose(self._unsent.popleft())

    def _wait(self, row: int) -> None:
        started = time.monotonic()
        self._held = not self._push(self._max_pending, math.inf)
        self.waited[row] += time.monotonic() - started

    def _push(self, pending: int, deadline: float) -> bool:
        """Sends blocks until at most `pending` windows of a stream wait; False if it was told to stop before.

        With a deadline, `should_stop` is ignored, and the answers to the last blocks are waited for, too.
        """
        while not self._sent_all(pending, wait=deadline < math.inf):
            if time.monotonic() >= deadline or (deadline == math.inf and self._should_stop()):
                return False
        return True

    def _sent_all(self, pending: int, wait: bool) -> bool:
        """One step towards it; lasts as long as one question at most.

        Args:
            wait: for the answers to the last blocks, too.
        """
        try:
            if not self._life and not self._open():
                return False
            # One at a time: whoever works on several calls at once keeps no order between them.
            if self._sent is None and self._unsent:
                answer = self._link.append(self._life, self._unsent[0])
                self._sent = _Sent(self._unsent.popleft(), answer, time.monotonic())
            if self._sent is not None and (wait or self._unsent or self._sent.answer.done()):
                self._confirm(self._sent.answered())
                return False
            if max(self._pending) > pending:
                self._pending = self._link.settle(self._life, self._streams, pending, _SETTLE_SECONDS)
                return max(self._pending) <= pending
        except Gone as error:
            self._break_stream(str(error))
            return False
        return True

    def _open(self) -> bool:
        """Begins streams, if it can; a replay that is gone is looked for now and then."""
        if self._missed_at is not None and time.monotonic() - self._missed_at < _RETRY_SECONDS:
            time.sleep(_POLL_SECONDS)
            return False
        self._life = self._link.open(self._streams)
        if self._missed_at is not None:
            _log.warning("Acting goes on: the replay is back.")
        self._missed_at = None
        return True

    def _confirm(self, appended: Appended | None) -> None:
        if appended is None:
            return
        self._sent = None
        self._pending = appended.pending
        for row, due in enumerate(appended.due):
            self.items[row] += due

    def _break_stream(self, reason: str) -> None:
        """What was not confirmed goes to the replay that comes, as the beginning of new streams."""
        if self._missed_at is None:
            _log.warning("Acting waits for the replay, which is gone: %s", reason)
        if self._sent is not None:
            self._unsent.appendleft(self._sent.block)
            self._sent = None
        self._life, self._missed_at = 0, time.monotonic()
        self._pending = [0] * len(self._streams)

    def _lose(self, block: Block) -> None:
        """Counts the windows of a block that never arrives."""
        for row, count in enumerate(block.counts):
            windows = -(-count // self._stride)
            self.items[row] += windows
            self.lost[row] += windows
        _log.warning("Replay lost %d steps on their way.", sum(block.counts))
