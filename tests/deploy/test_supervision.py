"""One mechanism for every part: answers, silence, restarts with back-off, the end of a crash loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from common.config import SupervisionConfig
from common.types import UserError
from deploy import supervision
from deploy.supervision import Supervisor

CONFIG = SupervisionConfig(grace_seconds=0.2, backoff_seconds=0.05, max_failures=3)


class Part:
    """Gives its answers one after another; an unfinished future is silence."""

    def __init__(self, *answers: Any):
        self.answers, self.calls = list(answers), []

    def call(self, method: str, *args: Any) -> Future[Any]:
        self.calls.append((method, *args))
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Future):
            return answer
        future: Future[Any] = Future()
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future


class Story:
    """A supervisor with one part, whose lives are given."""

    def __init__(self, *lives: Part, watch: bool = True, begin: Callable[[], None] = lambda: None):
        self.failures: list[str] = []
        self.started: list[float] = []
        self.parts = Supervisor(CONFIG, lambda name, error: self.failures.append(str(error)), watch)
        self._lives = iter(lives)
        self.parts.launch("part", self._start, begin)

    def _start(self) -> Part:
        self.started.append(time.monotonic())
        return next(self._lives)

    def step_until(self, condition: Callable[[], Any], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            self.parts.step(0.01)


def test_answers_arrive_in_the_order_of_asking():
    story = Story(Part(1, 2, 3))
    answers: list[int] = []
    for _ in range(3):
        story.parts.call("part", "count", then=answers.append)
    story.step_until(lambda: len(answers) == 3)
    assert answers == [1, 2, 3]
    assert not story.parts.busy({"part"})


def test_the_wait_before_a_restart_doubles_and_the_first_failure_ends_a_crash_loop(caplog):
    broken = [Part(RuntimeError(f"failure {number}")) for number in range(4)]
    story = Story(*broken)

    def crash() -> None:
        if story.parts.proxy("part") is not None and not story.parts.busy({"part"}):
            story.parts.call("part", "work")

    with pytest.raises(UserError, match="part failed 4 times in a row: failure 0"):
        story.step_until(crash)
    assert story.failures == ["failure 0", "failure 1", "failure 2"]
    waits = [later - earlier for earlier, later in zip(story.started, story.started[1:], strict=False)]
    assert [wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True)] == [True] * 3
    assert "the first failure of part" in caplog.text


def test_progress_forgets_failures_and_tells_how_long_it_took():
    story = Story(*[Part(RuntimeError("broken")) for _ in range(10)])
    for _ in range(6):
        story.parts.call("part", "work")
        story.step_until(lambda: story.parts.down())
        assert "down/part" in story.parts.metrics()
        story.step_until(lambda: story.parts.proxy("part"))
        assert story.parts.down()  # it was started, but has done nothing yet
        story.parts.progressed("part")
        assert not story.parts.down()
        metrics = story.parts.metrics()
        assert metrics["recovered/part"] >= 0.05
        assert not story.parts.metrics()


def test_a_silent_part_is_replaced_and_its_late_answer_ignored():
    late: Future[str] = Future()
    answers: list[str] = []
    story = Story(Part("first", late), Part("second"))
    story.parts.call("part", "work", then=answers.append)
    story.step_until(lambda: answers)
    story.parts.call("part", "work", then=answers.append)
    asked = time.monotonic()
    story.step_until(lambda: story.failures)
    assert time.monotonic() - asked >= CONFIG.grace_seconds
    assert "no answer" in story.failures[0]
    late.set_result("too late")
    story.step_until(lambda: story.parts.proxy("part"))
    story.parts.call("part", "work", then=answers.append)
    story.step_until(lambda: len(answers) == 2)
    assert answers == ["first", "second"]


def test_nobody_is_called_silent_without_a_reason(monkeypatch):
    """While a part starts, waits for an earlier call, is not watched, or this process itself stood still."""
    starting = Story(Part(Future()))
    starting.parts.call("part", "start")
    first, second = Future[Any](), Future[Any]()
    queued = Story(Part(None, first, second))
    queued.parts.call("part", "start")
    for _ in range(2):
        queued.parts.call("part", "work", patience=0.4)
    unwatched = Story(Part(None, Future()), watch=False)
    unwatched.parts.call("part", "start")
    unwatched.parts.call("part", "work")
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        for story in (starting, queued, unwatched):
            story.parts.step(0.01)
    first.set_result(None)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        queued.parts.step(0.01)
    stopped = Story(Part(None, Future()))
    stopped.parts.call("part", "start")
    stopped.parts.call("part", "work")
    stopped.parts.step(0.01)
    monkeypatch.setattr(supervision, "_PAUSE_SECONDS", 0.25)
    time.sleep(0.3)
    stopped.parts.step(0.01)
    assert [story.failures for story in (starting, queued, unwatched, stopped)] == [[]] * 4


def test_a_user_error_ends_the_run_or_goes_to_whoever_knows_better():
    refused: list[UserError] = []
    story = Story(Part(UserError("disk full"), UserError("disk full")))
    story.parts.call("part", "save", otherwise=refused.append)
    story.step_until(lambda: refused)
    story.parts.call("part", "save")
    with pytest.raises(UserError, match="disk full"):
        story.step_until(lambda: False)
    assert not story.failures


def test_an_answer_is_asked_for_again_after_a_failure():
    story = Story(Part(RuntimeError("died")), Part("saved"))
    assert story.parts.ask("part", "save", 7) == "saved"
    assert story.failures == ["died"]
    assert story.parts.ask("part", "save", unless=lambda: True) is None


def test_calls_in_flight_go_with_their_part_and_count_as_one_failure():
    story = Story(Part(RuntimeError("died"), RuntimeError("died")), Part())
    for _ in range(2):
        story.parts.call("part", "work")
    story.step_until(lambda: story.failures)
    assert not story.parts.busy({"part"})
    story.parts.call("part", "work", then=lambda _: pytest.fail("nobody was there to answer"))
    story.step_until(lambda: story.parts.proxy("part"))
    assert len(story.failures) == 1


def test_a_retired_part_is_not_started_anew(caplog):
    story = Story(Part(RuntimeError("too late")))
    story.parts.retire(["part"])
    story.parts.call("part", "finish")
    story.step_until(lambda: "part failed at the end: too late" in caplog.text)
    story.parts.step(0.1)
    assert len(story.started) == 1
    assert not story.parts.down()
