"""SIGINT, SIGTERM and SIGHUP: who hears of them, and when."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_ONE_WISH_SECONDS = 1.0  # `timeout` and terminals may deliver one wish to stop as several signals

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal ended the run before there was anything to save, or for the second time."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def interrupt(number: int) -> NoReturn:
    """A handler for stretches in which nothing can be saved yet: the run is simply left."""
    raise Interrupted(number)


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """The signals that end a run call `handler(number)` meanwhile; a SIGHUP that nohup ignores stays so."""
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handling in before.items():
        if number != signal.SIGHUP or handling != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: handler(number))
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the end, and processes started meanwhile never see them.

    Ctrl-C and `timeout` signal a whole process group: parts that died at once could not save anything.
    Handlers that are installed meanwhile are taken back.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        _restore(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handling in handlers.items():
        signal.signal(number, signal.SIG_DFL if handling is None else handling)  # None: not Python's


class StopWish:
    """What signals have asked of a run: the first one ends it with a checkpoint, a second one without.

    It only takes note: an exception raised in a handler may be swallowed (in a garbage collector's callback).

    Args:
        told: hears of the first signal.
    """

    def __init__(self, told: Callable[[int], None]):
        self.signal: int | None = None  # the first one
        self._second: int | None = None
        self._told, self._at = told, 0.0

    def hear(self, number: int) -> None:
        """Takes note of a signal."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = number, now
            self._told(number)
        elif now - self._at > _ONE_WISH_SECONDS:
            self._second = number

    def leave_at_first(self) -> None:
        """Raises Interrupted after any signal: there is nothing to save yet."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def leave_at_second(self) -> None:
        """Raises Interrupted after a second signal."""
        if self._second is not None:
            raise Interrupted(self._second)
