"""SIGINT, SIGTERM and SIGHUP: who hears of them, and when."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

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
