"""A table in memory as files: numbers and bytes alone, whose sizes are known before they are read.

    table.json      counts, and per lane how many steps and windows there are (those that waited for the
                    limiter count as let in)
    windows         int64, first steps of the windows of all lanes
    column0         rows of bytes: per lane pieces of consecutive steps, the newest piece first
    column1, ...    the big arrays alike; compressed ones one behind the other,
    sizes1, ...     with the bytes of each (int64)

While a table is written, others go on using it: what they overwrite meanwhile are the oldest steps, which are
left out then.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.manifest import DamagedCheckpoint
from common.types import ArraySpec
from common.untrusted import is_count, read_json
from replay.memory import frames
from replay.memory.frames import Frames
from replay.memory.table import Lane, MemoryTable

TABLE = "table.json"
_WINDOWS = "windows"
_PIECE_BYTES = 4_000_000  # copied at a time, while nobody else may touch the table: about a millisecond
_MAX_JSON = 50_000_000
_MAX_LANES = 1_000_000


class _Saved(NamedTuple):
    """A lane in a checkpoint; its steps are numbered from 0."""

    steps: int
    starts: np.ndarray  # int64, of windows
    columns: list[Any]  # as in `Lane`


# ------------------------------------------------------------------------------------------ saving


def save(table: MemoryTable, directory: Path) -> None:
    """Writes the table into an empty directory. Raises OSError."""
    with ExitStack() as stack:
        columns = [
            stack.enter_context(open(directory / f"column{number}", "wb"))
            for number in range(table.layout.num_columns)
        ]
        with table.changed:
            waiting = sum(lane.pending for lane in table.lanes)
            about: dict[str, Any] = {"inserted": table.inserted + waiting, "sampled": table.sampled}
            marks = [_Mark(lane) for lane in table.lanes]
        about["compressed"] = table.compressed
        sizes: list[list[np.ndarray]] = [[] for _ in columns]
        about["lanes"] = [mark.write(table, columns, sizes) for mark in marks]
    np.concatenate([mark.windows() for mark in marks]).tofile(directory / _WINDOWS)
    if table.compressed:
        for number in range(1, len(columns)):
            packed = sizes[number]
            (np.concatenate(packed) if packed else np.zeros(0, np.int64)).tofile(directory / f"sizes{number}")
    (directory / TABLE).write_text(json.dumps(about))


class _Mark:
    """What there was in a lane at one moment. Made while nobody else touches the table."""

    def __init__(self, lane: Lane):
        self._lane = lane
        self._end = lane.written
        self._starts = lane.all_starts()
        self._oldest = lane.oldest

    def windows(self) -> np.ndarray:
        """Starts of the windows whose steps were written, counted from the first one written."""
        return self._starts[self._starts >= self._oldest] - self._oldest

    def write(self, table: MemoryTable, files: Sequence[BinaryIO], sizes: list[list[np.ndarray]]) -> dict:
        """Writes the steps, the newest first; what of them it found."""
        lane, pieces, end = self._lane, [], self._end
        count = max(1, _PIECE_BYTES // lane.step_bytes)
        while end > self._oldest:
            with table.changed:
                self._oldest = max(self._oldest, lane.oldest)
                start = max(self._oldest, end - count)
                if start >= end:
                    break
                piece = [_copied(lane.read(start, end - start, number)) for number in range(len(files))]
            for number, (file, steps) in enumerate(zip(files, piece, strict=True)):
                if isinstance(steps, list):
                    steps, packed = frames.joined(steps)
                    sizes[number].append(packed)
                file.write(np.ascontiguousarray(steps).data)
            pieces.append(end - start)
            end = start
        return {"pieces": pieces, "windows": len(self.windows())}


def _copied(steps: Any) -> Any:
    return list(steps) if isinstance(steps, list) else np.array(steps)


# ----------------------------------------------------------------------------------------- loading


def load(table: MemoryTable, directory: Path) -> int:
    """Fills a new table; how many windows found no room, because there are fewer or shorter lanes now.

    Raises DamagedCheckpoint for files that do not fit each other or the table.
    """
    try:
        about, saved = _read(table, directory)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: {error}") from None
    with table.changed:
        table.inserted, table.sampled = about["inserted"], about["sampled"]
        room = [lane.windows for lane in table.lanes]
        if len(saved) == len(table.lanes):
            parts = [(each, number, 0, len(each.starts)) for number, each in enumerate(saved)]
        else:
            parts = list(_dealt(saved, room))
        for each, number, first, last in parts:
            _fill(table.lanes[number], each, first, last)
    kept = sum(last - first for _, _, first, last in parts)
    return sum(len(each.starts) for each in saved) - kept


def _dealt(saved: Sequence[_Saved], room: list[int]) -> Iterator[tuple[_Saved, int, int, int]]:
    """Windows of other lanes for these: (saved, number of the lane, first, last), the newest of each."""
    total = sum(len(each.starts) for each in saved)
    share = min(-(-total // len(room)), room[0])
    number, left = 0, share
    for each in saved:
        last = len(each.starts)
        while last and number < len(room):
            first = max(0, last - left)
            yield each, number, first, last
            left -= last - first
            last = first
            if not left:
                number, left = number + 1, share


def _fill(lane: Lane, saved: _Saved, first: int, last: int) -> None:
    if first == last:
        return
    begin, end = int(saved.starts[first]), int(saved.starts[last - 1]) + lane.length
    begin = max(begin, end - lane.steps)
    shift = lane.written - begin
    lane.copy_in([column[begin:end] for column in saved.columns], end - begin)
    for window in range(first, last):
        lane.add_window(int(saved.starts[window]) + shift)
    lane.forget()
    lane.release_all()


def _read(table: MemoryTable, directory: Path) -> tuple[dict[str, Any], list[_Saved]]:
    about = read_json(directory / TABLE, _MAX_JSON)
    _check(is_count(about["inserted"]) and is_count(about["sampled"]), "it holds no counts")
    lanes, compressed = about["lanes"], about["compressed"]
    _check(isinstance(lanes, list) and len(lanes) <= _MAX_LANES, "it holds no lanes")
    _check(isinstance(compressed, bool), "it does not say how it is written")
    most = table.spec.max_size * table.spec.stride + _MAX_LANES
    for lane in lanes:
        numbers = [lane["windows"], *lane["pieces"]]
        _check(all(is_count(number) for number in numbers), "a lane holds no counts")
        _check(sum(lane["pieces"]) <= most, "a lane is too long")
    steps = [sum(lane["pieces"]) for lane in lanes]
    starts = _numbers(directory / _WINDOWS, sum(lane["windows"] for lane in lanes))
    pieces = [lane["pieces"] for lane in lanes]
    columns = [
        _column(table, directory, number, spec, pieces, compressed)
        for number, spec in enumerate(table.layout.columns)
    ]
    saved, at = [], 0
    for number, lane in enumerate(lanes):
        own = starts[at : at + lane["windows"]]
        at += lane["windows"]
        fits = len(own) == 0 or (own[0] >= 0 and own[-1] + table.spec.batch_length <= steps[number])
        _check(fits and bool((np.diff(own) > 0).all()), "a window has no steps")
        saved.append(_Saved(steps[number], own, [column[number] for column in columns]))
    return about, saved


def _column(
    table: MemoryTable,
    directory: Path,
    number: int,
    spec: ArraySpec,
    pieces: Sequence[Sequence[int]],
    compressed: bool,
) -> list[Any]:
    """A column of every lane, oldest step first, as this table keeps it."""
    path, steps = directory / f"column{number}", sum(sum(lane) for lane in pieces)
    dtype = np.dtype((np.dtype(spec.dtype), spec.shape))
    if not (compressed and number):
        _check(path.stat().st_size == steps * dtype.itemsize, f"{path.name} has not the size it should have")
        rows: Any = _bytes(path).view(spec.dtype).reshape(steps, *spec.shape)
    else:
        sizes = _numbers(directory / f"sizes{number}", steps)
        fits = bool((sizes > 0).all()) and sizes.sum() == path.stat().st_size
        _check(fits, f"{path.name} has not the size it should have")
        rows = frames.split(Frames(_bytes(path), sizes))
    column, at = [], 0
    for lane in pieces:
        own = rows[at : at + sum(lane)]
        at += sum(lane)
        column.append(_as_kept(_forward(own, lane), spec, table.compressed and number > 0))
    return column


def _forward(rows: Any, pieces: Sequence[int]) -> Any:
    """Steps in their order, from pieces of which the newest comes first."""
    ends = np.cumsum([0, *pieces])
    parts = [rows[begin:end] for begin, end in itertools.pairwise(ends)][::-1]
    if isinstance(rows, list):
        return [step for part in parts for step in part]
    return np.concatenate(parts) if parts else rows


def _as_kept(rows: Any, spec: ArraySpec, compressed: bool) -> Any:
    """Whatever a checkpoint holds, compressed or not as this table keeps it; checks every frame."""
    if isinstance(rows, list):
        out = np.empty((1, *spec.shape), spec.dtype)
        whole = None if compressed else np.empty((len(rows), *spec.shape), spec.dtype)
        for at, row in enumerate(rows):
            target = out if whole is None else whole[at : at + 1]
            frames.decompress(frames.joined([row]), target)
        return rows if whole is None else whole
    return [frames.compress(row) for row in rows] if compressed else rows


def _bytes(path: Path) -> np.ndarray:
    """A file's content, uint8; read when it is used, for it may be as large as the memory."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)


def _numbers(path: Path, count: int) -> np.ndarray:
    """So many int64. Raises ValueError when the file has not just these."""
    _check(path.stat().st_size == 8 * count, f"{path.name} has not the size it should have")
    return np.fromfile(path, np.int64)


def _check(fine: bool, problem: str) -> None:
    if not fine:
        raise ValueError(problem)
