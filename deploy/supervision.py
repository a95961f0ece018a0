"""Keeps the parts of a run at work: their answers, who is down and since when, restarts with back-off.

Every part is treated alike. It fails when its process dies, when a call raises anything but a
UserError, and when the oldest call in flight gets no answer in time. It is then started anew, each time
after twice the wait; failures in a row, without progress in between, end the run with the first of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from common.config import SupervisionConfig
from common.types import UserError

logger = logging.getLogger(__name__)

# Parts of a run beside its actors.
LEARNER, INFERENCE, EVALUATOR, METRICS = "learner", "inference", "evaluator", "metrics"
TICK_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 30.0
_START_SECONDS = 3600.0  # until a part answers first: imports, compilation, restoring a large replay buffer
_PAUSE_SECONDS = 5.0  # this process itself stood still (Ctrl-Z): nobody else is to blame


class Proxy(Protocol):
    """A part that lives elsewhere; its calls run one after another, in order."""

    def call(self, method: str, *args: Any) -> Future[Any]: ...


@dataclass
class _Part:
    start: Callable[[], Proxy]
    begin: Callable[[], None]
    proxy: Proxy | None = None  # None while it waits for its restart
    needed: bool = True
    heard: float = 0.0  # when it was started or answered last
    answered: bool = False  # since it was started
    failures: int = 0  # in a row, without progress in between
    first_error: Exception | None = None  # of them
    down_since: float | None = None
    restart_at: float = 0.0


@dataclass
class _Call:
    name: str  # of the part
    asked: float
    patience: float  # seconds
    then: Callable[[Any], Any]
    otherwise: Callable[[UserError], Any]


def first_words(error: BaseException) -> str:
    """An error in one short line."""
    return " ".join(str(error).split())[:200] or repr(error)


class Supervisor:
    """Parts by name, and their calls in flight. Everything happens in the thread that calls `step`.

    Args:
        on_failure: hears (name, error) of every failure that is followed by a restart.
        watch: whether silence counts as a failure; a thread that hangs cannot be replaced.
    """

    def __init__(self, cfg: SupervisionConfig, on_failure: Callable[[str, Exception], None], watch: bool):
        self._cfg, self._on_failure, self._watch = cfg, on_failure, watch
        self._parts: dict[str, _Part] = {}
        self._calls: dict[Future[Any], _Call] = {}  # in the order of asking
        self._recovered: dict[str, float] = {}
        self._stepped = time.monotonic()

    def launch(self, name: str, start: Callable[[], Proxy], begin: Callable[[], None]) -> None:
        """Starts a part, now and after each failure: `start` makes it, `begin` makes its first calls."""
        self._parts[name] = _Part(start, begin)
        self._start(name)

    def call(
        self,
        name: str,
        method: str,
        *args: Any,
        then: Callable[[Any], Any] = lambda _: None,
        otherwise: Callable[[UserError], Any] | None = None,
        patience: float | None = None,
    ) -> None:
        """Asks a part; `then` gets the answer, `otherwise` a UserError (default: it ends the run).

        Nothing happens while the part is down, and an answer lost with it is not given: its `begin`
        makes up for both. `patience` is in seconds, by default the configured grace.
        """
        part = self._parts[name]
        if part.proxy is not None:
            patience = self._cfg.grace_seconds if patience is None else patience
            call = _Call(name, time.monotonic(), patience, then, otherwise or _end_the_run)
            self._calls[part.proxy.call(method, *args)] = call

    def ask(
        self,
        name: str,
        method: str,
        *args: Any,
        patience: float | None = None,
        unless: Callable[[], Any] = lambda: False,
    ) -> Any:
        """Waits for an answer, from its successor where a part fails meanwhile; None once `unless()`."""
        answers: list[Any] = []
        asked: Proxy | None = None
        while not answers and not unless():
            proxy = self._parts[name].proxy
            if proxy is not asked:
                asked = proxy
                self.call(name, method, *args, then=answers.append, patience=patience)
            self.step()
        return answers[0] if answers else None

    def step(self, seconds: float = TICK_SECONDS) -> None:
        """Waits at most `seconds` for answers; deals with them, with silence and with restarts due."""
        done, _ = wait(self._calls, seconds, FIRST_COMPLETED)
        if not self._calls:
            time.sleep(seconds)
        for future in [future for future in self._calls if future in done]:
            call = self._calls.pop(future, None)
            if call is not None:  # else its part has just failed
                self._answered(call, future)
        now = time.monotonic()
        if now - self._stepped > _PAUSE_SECONDS:
            for part in self._parts.values():
                part.heard = now
        self._stepped = now
        if self._watch:
            self._notice_silence(now)
        for name, part in self._parts.items():
            if part.proxy is None and part.needed and now >= part.restart_at:
                self._start(name)

    def fail(self, name: str, error: Exception) -> None:
        """Ends a part and plans its restart. Raises UserError when it has failed too often in a row."""
        part, now = self._parts[name], time.monotonic()
        part.proxy = None
        self._calls = {future: call for future, call in self._calls.items() if call.name != name}
        if not part.needed:
            logger.warning("%s failed at the end: %s", name, first_words(error))
            return
        part.failures += 1
        part.first_error = part.first_error or error
        part.down_since = part.down_since or now
        if part.failures > self._cfg.max_failures:
            first = part.first_error
            logger.error("the first failure of %s:", name, exc_info=first)
            raise UserError(f"{name} failed {part.failures} times in a row: {first_words(first)}") from first
        wait_seconds = self._cfg.backoff_seconds * 2 ** (part.failures - 1)
        part.restart_at = now + min(wait_seconds, _LONGEST_BACKOFF_SECONDS)
        self._on_failure(name, error)

    def progressed(self, name: str) -> None:
        """The part did its work: it is not down (any more), and earlier failures are forgotten."""
        part = self._parts[name]
        part.failures, part.first_error = 0, None
        if part.down_since is not None:
            self._recovered[name] = time.monotonic() - part.down_since
            part.down_since = None
            logger.info("%s is back after %.1f s", name, self._recovered[name])

    def retire(self, names: Iterable[str]) -> None:
        """These parts are not started anew from now on."""
        for name in names:
            self._parts[name].needed = False

    def busy(self, names: Iterable[str]) -> bool:
        """Whether one of these parts owes an answer."""
        return any(call.name in names for call in self._calls.values())

    def proxy(self, name: str) -> Proxy | None:
        """The part itself, None while it is down."""
        return self._parts[name].proxy

    def down(self) -> dict[str, float]:
        """The parts that do not work now, and for how many seconds."""
        now = time.monotonic()
        return {
            name: now - part.down_since
            for name, part in self._parts.items()
            if part.down_since is not None and part.needed
        }

    def metrics(self) -> dict[str, float]:
        """Who is down, and who has recovered since the last look, in seconds."""
        recovered, self._recovered = self._recovered, {}
        found = {"down": self.down(), "recovered": recovered}
        return {
            f"{kind}/{name.replace(' ', '')}": seconds
            for kind, parts in found.items()
            for name, seconds in parts.items()
        }

    def _start(self, name: str) -> None:
        part = self._parts[name]
        part.proxy, part.heard, part.answered = part.start(), time.monotonic(), False
        part.begin()

    def _answered(self, call: _Call, future: Future[Any]) -> None:
        part = self._parts[call.name]
        part.heard, part.answered = time.monotonic(), True
        error = future.exception()
        if error is None:
            call.then(future.result())
        elif isinstance(error, UserError):
            call.otherwise(error)
        elif isinstance(error, Exception):
            self.fail(call.name, error)
        else:
            raise error

    def _notice_silence(self, now: float) -> None:
        oldest: dict[str, _Call] = {}
        for call in self._calls.values():
            oldest.setdefault(call.name, call)
        for name, call in oldest.items():
            part = self._parts[name]
            silent = now - max(call.asked, part.heard)
            if silent > (call.patience if part.answered else max(call.patience, _START_SECONDS)):
                self.fail(name, TimeoutError(f"no answer for {silent:.0f} s"))


def _end_the_run(error: UserError) -> NoReturn:
    raise error
