"""How old the parameters are that acted in what is learned from."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.workers import Ages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`clock[0]` is the time."""
    now = [0.0]
    monkeypatch.setattr("deploy.workers.time.monotonic", lambda: now[0])
    return now


def test_the_age_of_a_batch_by_hand(clock):
    ages = Ages()
    for version, at in ((1, 0.0), (2, 10.0), (3, 30.0)):
        clock[0] = at
        ages.published(version)
    clock[0] = 40.0
    ages.see(np.array([[1, 1], [2, 3]], np.int32))
    expected = {"replay/age_versions": (2 + 2 + 1 + 0) / 4, "replay/age_seconds": (40 + 40 + 30 + 10) / 4}
    assert ages.pop() == pytest.approx(expected)
    assert ages.pop() == {}


def test_random_actions_have_no_age(clock):
    ages = Ages()
    ages.see(np.array([[1]]))  # nothing was published yet
    ages.published(1)
    ages.see(np.zeros((2, 2), np.int32))
    assert ages.pop() == {}
    clock[0] = 5.0
    ages.see(np.array([[0, 1]], np.int32))
    assert ages.pop() == {"replay/age_versions": 0.0, "replay/age_seconds": 5.0}


def test_versions_of_an_earlier_life_are_as_old_as_this_life_at_least(clock):
    ages = Ages()
    clock[0] = 100.0
    ages.published(50)
    clock[0] = 110.0
    ages.see(np.array([[20, 50]], np.int32))
    assert ages.pop() == {"replay/age_versions": 15.0, "replay/age_seconds": 10.0}
