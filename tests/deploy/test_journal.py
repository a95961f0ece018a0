"""Rows reach the files once, however often their writer dies."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from common.config import LoggingConfig, SupervisionConfig
from common.metrics import METRICS, MetricsWriter
from common.sinks import read_jsonl
from common.types import UserError
from deploy.journal import Journal
from deploy.supervision import Supervisor


class Writer:
    """A metrics writer that dies at its `lives`-th call: before it writes, or before it can say so."""

    def __init__(self, run: Path, at: int | None, lives: int, silently: bool):
        self._writer = MetricsWriter(run, LoggingConfig(tensorboard=False), {}, at)
        self._lives, self._silently = lives, silently

    def call(self, method: str, *args: Any) -> Future[Any]:
        self._lives -= 1
        future: Future[Any] = Future()
        if self._lives > 0 or (self._lives == 0 and self._silently):
            getattr(self._writer, method)(*args)
        if self._lives > 0:
            future.set_result(None)
        else:
            future.set_exception(RuntimeError("killed"))
        return future


@pytest.mark.parametrize("silently", [False, True])
def test_no_row_is_missing_and_none_is_there_twice(tmp_path, silently):
    parts = Supervisor(SupervisionConfig(backoff_seconds=0.01), lambda name, error: None, watch=True)
    journal = Journal(parts, lambda at: Writer(tmp_path, at, 4, silently), None)
    for number in range(1, 11):
        journal.record("write", number, {"train/updates": number})
        parts.step(0.01)
    for _ in range(50):
        parts.step(0.01)
    assert [row["train/updates"] for row in read_jsonl(tmp_path / METRICS)] == list(range(1, 11))


class Refusing:
    def __init__(self, accepted: int):
        self._accepted = accepted

    def call(self, method: str, *args: Any) -> Future[Any]:
        self._accepted -= 1
        future: Future[Any] = Future()
        if self._accepted >= 0:
            future.set_result(None)
        else:
            future.set_exception(UserError("no space left"))
        return future


def test_a_full_disk_is_waited_for_but_not_at_the_start():
    failures: list[Exception] = []
    parts = Supervisor(SupervisionConfig(), lambda name, error: failures.append(error), watch=True)
    journal = Journal(parts, lambda at: Refusing(1), None)
    for number in range(2):
        journal.record("write", number, {})
    parts.step(0.01)
    assert len(failures) == 1
    parts = Supervisor(SupervisionConfig(), lambda name, error: failures.append(error), watch=True)
    journal = Journal(parts, lambda at: Refusing(0), None)
    journal.record("write", 0, {})
    with pytest.raises(UserError, match="no space"):
        parts.step(0.01)
