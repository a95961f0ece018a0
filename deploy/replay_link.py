"""The way to a replay in the memory of another process, through Ray."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from replay.memory.link import SILENT_SECONDS
from replay.memory.table import Appended, Block, Columns, Gone


class RayLink:
    """A `replay.memory.link.Link` to a `deploy.light_parts.ReplayInMemory`, also to the one after it.

    Batches come through Ray's shared memory: what is large is mapped, not copied.
    """

    batches = 16

    def __init__(self, handle: Any, part: str):
        self._handle = handle
        self.part = part  # its name in the run

    def go_to(self, handle: Any) -> None:
        """The replay is this one from now on."""
        self._handle = handle

    def open(self, streams: Sequence[int]) -> int:
        return self._get(self._handle.open.remote(tuple(streams)), 0.0)

    def append(self, life: int, block: Block) -> Future[Appended]:
        answer: Future[Appended] = Future()

        def arrived(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(_told(error))

        self._handle.append.remote(life, block).future().add_done_callback(arrived)
        return answer

    def settle(self, life: int, streams: Sequence[int], at_most: int, timeout: float) -> list[int]:
        return self._get(self._handle.settle.remote(life, tuple(streams), at_most, timeout), timeout)

    def draw(self, batch_size: int, at_most: int, timeout: float) -> tuple[int, Columns]:
        return self._get(self._handle.draw.remote(batch_size, at_most, timeout), timeout)

    @staticmethod
    def _get(reference: Any, timeout: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout + SILENT_SECONDS)
        except GetTimeoutError:
            raise Gone(f"no answer for {SILENT_SECONDS:.0f} s") from None
        except (RayActorError, RayTaskError) as error:
            raise _told(error) from error


def _told(error: BaseException) -> BaseException:
    """What it means for whoever asked; Gone for a process that has ended."""
    if isinstance(error, RayTaskError):
        return error.cause
    return Gone("its process has ended") if isinstance(error, RayActorError) else error
