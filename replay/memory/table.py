"""Streams, windows and the rate limiter, in the memory of this process.

Every environment has a lane: a ring of its newest steps, and where its windows begin. A batch copies windows
out of the lanes, so that whoever gets it owns it.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.memory import frames
from replay.memory.frames import Frames
from replay.table import Layout, ReplayInfo, TableSpec, chunk_length, step_bytes

# A window that waits for the limiter keeps its steps that long, in chunks, beside a full lane.
_SLACK_CHUNKS = 4


class Block(NamedTuple):
    """Consecutive steps of k streams, as they travel to a table."""

    streams: tuple[int, ...]  # [k], their numbers
    counts: tuple[int, ...]  # [k], steps of each
    # One entry per column of `Layout`: arrays [k, n, ...], or k lists of n compressed arrays.
    columns: tuple[Any, ...]


class Appended(NamedTuple):
    """What became of a block, per stream."""

    due: list[int]  # windows that its steps completed
    pending: list[int]  # windows that wait for the limiter now


# Column 0 of some batches as rows [batches * B * L, bytes]; the big arrays alike, or compressed.
Columns = list[np.ndarray | Frames]


class Gone(ConnectionError):
    """The table, or what it knew of a stream, is gone: it was, or is being, started anew."""


class StreamTaken(RuntimeError):
    """The stream belongs to a later writer."""


class Lane:
    """The newest steps of one environment. Counts of steps and windows only grow; rings take them modulo."""

    def __init__(self, layout: Layout, compressed: bool, steps: int, windows: int, length: int, stride: int):
        # A compressed column is a list of bytes, of which each takes what it needs.
        self.columns: list[Any] = [
            [b""] * steps if compressed and number else np.empty((steps, *spec.shape), spec.dtype)
            for number, spec in enumerate(layout.columns)
        ]
        self.steps, self.length, self.stride = steps, length, stride
        # Of windows, those that wait among them, and for a moment of some whose steps were just overwritten.
        self.starts = np.zeros(steps + length, np.int64)
        self.windows = windows  # that can be sampled at most
        self.written = 0  # steps ever
        self.run = 0  # steps of the present stream
        self.first = self.last = self.due = 0  # windows: first <= i < last can be sampled, the rest waits
        self.step_bytes = step_bytes(layout.signature)
        self.owner = 0  # the life of its writer; 0: none

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def pending(self) -> int:
        return self.due - self.last

    @property
    def oldest(self) -> int:
        """The oldest step that is still there."""
        return max(0, self.written - self.steps)

    def start(self, window: int) -> int:
        """The step with which a window begins."""
        return int(self.starts[window % len(self.starts)])

    def put(self, columns: Sequence[Any], count: int) -> int:
        """Appends steps of the present stream; how many windows are due with them."""
        self.copy_in(columns, count)
        before = self.due
        for step in range(self.written - count, self.written):
            self.run += 1
            beyond = self.run - self.length
            if beyond >= 0 and beyond % self.stride == 0:
                self.add_window(step + 1 - self.length)
        return self.due - before

    def copy_in(self, columns: Sequence[Any], count: int) -> None:
        """Appends steps, at most as many as the lane holds."""
        at = self.written % self.steps
        head = min(count, self.steps - at)
        for ring, column in zip(self.columns, columns, strict=True):
            ring[at : at + head] = column[:head]
            ring[: count - head] = column[head:count]
        self.written += count

    def all_starts(self) -> np.ndarray:
        """First steps of the windows, int64, of those that wait as well."""
        return self.starts[np.arange(self.first, self.due) % len(self.starts)]

    def add_window(self, start: int) -> None:
        """Of steps that are there."""
        self.starts[self.due % len(self.starts)] = start
        self.due += 1

    def forget(self) -> int:
        """Drops windows whose steps were overwritten; how many of them had never been sampled from."""
        lost = 0
        while self.first < self.due and self.start(self.first) < self.oldest:
            self.first += 1
            if self.first > self.last:
                self.last, lost = self.first, lost + 1
        return lost

    def release(self) -> None:
        """Lets the oldest waiting window be sampled, in place of the oldest one where the lane is full."""
        self.last += 1
        if self.size > self.windows:
            self.first += 1

    def release_all(self) -> None:
        """Of a lane that was restored: nobody waits for its windows."""
        self.last = self.due
        self.first = max(self.first, self.last - self.windows)

    def read(self, start: int, count: int, column: int) -> Any:
        """Steps of a ring, as a view where they lie together; of a compressed column a list."""
        ring, at = self.columns[column], start % self.steps
        head, rest = ring[at : at + count], max(0, at + count - self.steps)
        if not rest:
            return head
        return head + ring[:rest] if isinstance(ring, list) else np.concatenate([head, ring[:rest]])


class MemoryTable:
    """Windows of all streams: uniform sampling, oldest out first, tied to inserts as by Reverb's limiter.

    Safe to use from several threads. `compressed` says whether big arrays travel and stay compressed.
    """

    def __init__(self, spec: TableSpec, streams: int, compressed: bool):
        self.spec, self.layout, self.compressed = spec, Layout(spec.signature), compressed
        self.changed = threading.Condition()
        self.inserted = self.sampled = 0
        self.lost = 0  # windows that were overwritten before the limiter let them in
        windows = max(1, spec.max_size // streams)
        steps = windows * spec.stride + spec.batch_length + _SLACK_CHUNKS * chunk_length(spec.batch_length)
        self.lanes = [
            Lane(self.layout, compressed, steps, windows, spec.batch_length, spec.stride)
            for _ in range(streams)
        ]
        self._waiting: deque[Lane] = deque()  # one entry per window, in the order of arrival
        self._lives = 1 + secrets.randbits(60)  # a table that is started anew shall know no old writer
        self._rng = np.random.default_rng()
        self._closed = False

    def open(self, streams: Sequence[int]) -> int:
        """Begins new streams with these numbers; the life with which their steps come.

        Whoever wrote under these numbers before is shut out.
        """
        with self.changed:
            self._lives += 1
            for stream in streams:
                lane = self.lanes[stream]
                lane.owner, lane.run = self._lives, 0
            return self._lives

    def append(self, life: int, block: Block) -> Appended:
        """Takes steps. Never blocks: windows that the limiter holds back wait in their lanes.

        Raises Gone when the table does not know the streams (any more), StreamTaken when another writer has
        them.
        """
        with self.changed:
            lanes, due = self._owned(life, block.streams), []
            for row, (lane, count) in enumerate(zip(lanes, block.counts, strict=True)):
                due.append(lane.put([column[row] for column in block.columns], count))
                self._waiting.extend([lane] * due[-1])
                self.lost += lane.forget()
            self._release()
            self.changed.notify_all()
            return Appended(due, [lane.pending for lane in lanes])

    def settle(self, life: int, streams: Sequence[int], at_most: int, timeout: float) -> list[int]:
        """Waits until at most so many windows of each stream wait for the limiter; how many do then.

        Raises what `append` raises.
        """
        with self.changed:
            lanes = self._owned(life, streams)
            self.changed.wait_for(
                lambda: self._closed or all(lane.pending <= at_most for lane in lanes), timeout
            )
            return [lane.pending for lane in lanes]

    def draw(self, batch_size: int, at_most: int, timeout: float) -> tuple[int, Columns]:
        """How many batches the limiter allows now, up to `at_most`, and their columns; waits for the first.

        After `timeout` seconds, and once the table is closed, there are none.
        """
        with self.changed:
            allowed = self.changed.wait_for(lambda: self._closed or self._may_sample(batch_size), timeout)
            if not allowed or self._closed:
                return 0, []
            batches = 1
            while batches < at_most and self._may_sample((batches + 1) * batch_size):
                batches += 1
            columns = self._copy(self._pick(batches * batch_size))
            self.sampled += batches * batch_size
            self._release()
            self.changed.notify_all()
            return batches, columns

    def info(self) -> ReplayInfo:
        """The counts now."""
        with self.changed:
            return ReplayInfo(self.size, self.inserted, self.sampled)

    def close(self) -> None:
        """Ends all waiting."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    @property
    def size(self) -> int:
        """Windows that can be sampled."""
        return sum(lane.size for lane in self.lanes)

    def _owned(self, life: int, streams: Sequence[int]) -> list[Lane]:
        lanes = [self.lanes[stream] for stream in streams]
        if any(lane.owner == 0 for lane in lanes):
            raise Gone(f"the replay does not know the streams {list(streams)}")
        if any(lane.owner != life for lane in lanes):
            raise StreamTaken(f"the streams {list(streams)} belong to another writer now")
        return lanes

    # The rules of Reverb's limiter (SampleToInsertRatio), so that both replays hold the same ratio.

    def _may_insert(self) -> bool:
        after = (self.inserted + 1) * self.spec.samples_per_insert - self.sampled
        return after <= self.spec.error_range[1] or self.inserted < self.spec.min_size or not self.size

    def _may_sample(self, count: int) -> bool:
        after = self.inserted * self.spec.samples_per_insert - self.sampled - count
        return after >= self.spec.error_range[0] and self.inserted >= self.spec.min_size and self.size > 0

    def _release(self) -> None:
        while self._waiting and self._may_insert():
            lane = self._waiting.popleft()
            if lane.pending:  # else it was overwritten
                lane.release()
                self.inserted += 1

    def _pick(self, count: int) -> list[tuple[Lane, int]]:
        """Uniformly drawn windows: their lane and their first step."""
        ends = np.cumsum([lane.size for lane in self.lanes])
        picks = self._rng.integers(ends[-1], size=count)
        found = np.searchsorted(ends, picks, side="right")
        picked = []
        for pick, number in zip(picks.tolist(), found.tolist(), strict=True):
            lane = self.lanes[number]
            picked.append((lane, lane.start(lane.last - int(ends[number]) + pick)))
        return picked

    def _copy(self, windows: Sequence[tuple[Lane, int]]) -> Columns:
        length = self.spec.batch_length
        columns: Columns = []
        for number, spec in enumerate(self.layout.columns):
            parts = [lane.read(start, length, number) for lane, start in windows]
            if self.compressed and number:
                columns.append(frames.joined([each for part in parts for each in part]))
                continue
            out = np.empty((len(windows), length, *spec.shape), spec.dtype)
            for row, part in enumerate(parts):
                out[row] = part
            columns.append(out)
        return columns
