"""What a run was made with, and what a file says about it that somebody else may have written."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import pytest

from common import versions
from common.versions import Stretch, as_json, continued, other_physics, recorded

OLD = {"python": "3.11.7", "mujoco": "2.3.3", "safety-gymnasium": "1.0.0", "jax": "0.6.2"}


@pytest.fixture
def mujoco_317(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    now = OLD | {"python": "3.13.0", "mujoco": "3.17.0", "jax": "0.12.0.1"}
    monkeypatch.setattr(versions, "here", lambda: dict(now))
    return now


def test_they_are_those_of_what_is_imported() -> None:
    import jax
    import mujoco

    assert versions.here() == {
        "python": platform.python_version(),
        "mujoco": mujoco.__version__,  # pyright: ignore[reportAttributeAccessIssue]
        "safety-gymnasium": "1.0.0",
        "jax": jax.__version__,
    }


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "mujoco":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    assert versions.here().keys() == {"python", "safety-gymnasium", "jax"}
    assert other_physics([Stretch(0, OLD)]) is None  # there is nothing to compare it with


def test_a_training_that_goes_on_elsewhere_keeps_what_it_began_with(mujoco_317: dict[str, str]) -> None:
    assert continued([], 0) == [Stretch(0, mujoco_317)]
    moved = continued([Stretch(0, OLD)], 1_000)
    assert moved == [Stretch(0, OLD), Stretch(1_000, mujoco_317)]
    assert continued(moved, 2_000) == moved


def test_what_is_written_is_read() -> None:
    stretches = [Stretch(0, OLD), Stretch(5, versions.here())]
    assert recorded(json.loads(json.dumps(as_json(stretches)))) == stretches


def test_a_sentence_for_another_mujoco_alone(mujoco_317: dict[str, str]) -> None:
    assert other_physics([Stretch(0, OLD)]) == (
        "trained on MuJoCo 2.3.3, this is 3.17.0: physics differ a little (docs/physics.md)"
    )
    both = [Stretch(0, OLD), Stretch(9, mujoco_317), Stretch(12, OLD | {"jax": "0.6.3"})]
    assert "trained on MuJoCo 2.3.3 and 3.17.0, this is 3.17.0" in str(other_physics(both))
    assert other_physics([Stretch(0, OLD | {"mujoco": "3.17.0"})]) is None  # another JAX is no other physics
    assert other_physics([]) is None
    assert other_physics([Stretch(0, {"jax": "0.6.2"})]) is None


def entry(**changes: Any) -> dict[str, Any]:
    return {"env_steps": 0, "versions": dict(OLD)} | changes


HOSTILE = {
    "nothing": None,
    "a word": "2.3.3",
    "a dict": OLD,
    "a number": 10**30,
    "no entries of ours": [1, [], None],
    "one that is none": [entry(), "2.3.3"],
    "another key": [entry(note="hello")],
    "a key less": [{"versions": OLD}],
    "negative env steps": [entry(env_steps=-1)],
    "env steps are true": [entry(env_steps=True)],
    "versions are a list": [entry(versions=["mujoco"])],
    "an unknown package": [entry(versions={"\x1b[2J": "1"})],
    "a version is a number": [entry(versions={"mujoco": 2.3})],
    "a version is a list": [entry(versions={"mujoco": ["2"]})],
    "a version is empty": [entry(versions={"mujoco": ""})],
    "a version is endless": [entry(versions={"mujoco": "2" * 1_000_000})],
    "a version has lines": [entry(versions={"mujoco": "2.3.3\nsafedreamer: done"})],
    "a version ends a line": [entry(versions={"mujoco": "2.3.3\n"})],
    "a version clears the terminal": [entry(versions={"mujoco": "\x1b[2J"})],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_none_of_ours_would_write_says_nothing(name: str) -> None:
    assert recorded(HOSTILE[name]) == []


def test_of_endless_stretches_the_newest_count() -> None:
    found = recorded([entry(env_steps=count) for count in range(100_000)])
    assert [stretch.env_steps for stretch in found] == list(range(99_980, 100_000))
