"""The way to a table in memory: through a call in this process or, in deploy, through Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from replay.memory.table import Appended, Block, Columns, Gone, MemoryTable

SILENT_SECONDS = 10.0  # beyond what a question may last: then nobody is there


class Link(Protocol):
    """The methods of a `MemoryTable` that writers and samplers need, wherever it is.

    All raise Gone while there is none.
    """

    batches: int  # that one call should fetch at most: many where a call is expensive

    def open(self, streams: Sequence[int]) -> int: ...

    def append(self, life: int, block: Block) -> Future[Appended]:
        """The answer may come later. A block that follows before it may arrive first."""
        ...

    def settle(self, life: int, streams: Sequence[int], at_most: int, timeout: float) -> list[int]: ...

    def draw(self, batch_size: int, at_most: int, timeout: float) -> tuple[int, Columns]: ...


class DirectLink:
    """To a table of this process. `table` gives the present one, or None while there is none."""

    batches = 1

    def __init__(self, table: Callable[[], MemoryTable | None]):
        self._table = table

    def open(self, streams: Sequence[int]) -> int:
        return self._there().open(streams)

    def append(self, life: int, block: Block) -> Future[Appended]:
        answer: Future[Appended] = Future()
        answer.set_result(self._there().append(life, block))
        return answer

    def settle(self, life: int, streams: Sequence[int], at_most: int, timeout: float) -> list[int]:
        return self._there().settle(life, streams, at_most, timeout)

    def draw(self, batch_size: int, at_most: int, timeout: float) -> tuple[int, Columns]:
        return self._there().draw(batch_size, at_most, timeout)

    def _there(self) -> MemoryTable:
        table = self._table()
        if table is None:
            raise Gone("there is no replay")
        return table
