"""Runs, checkpoints and results say what they were made with; agents of one set of packages act on the other.

tests/deploy/data holds a tiny agent of each set and what it did there (tests/deploy/make_data.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import results

from common import checkpoint, versions
from common.config import Config
from common.configuration import merge
from common.types import UserError
from common.versions import Stretch, as_json, recorded
from deploy import cli, evaluate, stack, warm_start
from deploy import run_dir as runs
from tests.deploy.conftest import meta_of
from tests.deploy.fake_workers import MADE_WITH, FakeWorkers, drive, saved_meta
from tests.deploy.make_data import ACTED, DATA, act

STACKS = ("classic", "modern")
OTHER = next(name for name in STACKS if name != stack.stack())
ELSEWHERE = Stretch(0, {"mujoco": "1.50", "jax": "0.1"})
# Largest difference seen between the sets: 7e-6 of an action in [-1, 1]; another elite would make far more.
CLOSE = 1e-4


def agent(name: str) -> Path:
    """The checkpoint that was recorded on a set of packages."""
    (path,) = (DATA / name).glob("step_*")
    return path


def made_with(path: Path) -> list[Stretch]:
    return recorded(checkpoint.read_meta(path)["versions"])


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """`run_of(name)`: a run directory with the checkpoint that was recorded on a set of packages."""

    def make(name: str) -> Path:
        source = agent(name)
        run = runs.create(tmp_path / name, runs.config_of(source, checkpoint.read_meta(source)))
        shutil.copytree(source, run / runs.CHECKPOINTS / source.name)
        return run

    return make


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`says("eval", ...)`: standard output and error of a command that succeeds."""

    def run(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert leaving.value.code == 0, err
        return out, err

    return run


def sentence(name: str) -> str:
    """What is said here of an agent of a set of packages."""
    then, now = made_with(agent(name))[-1].versions["mujoco"], versions.here()["mujoco"]
    if then == now:
        return ""
    text = f"trained on MuJoCo {then}, this is {now}: physics differ a little (docs/physics.md)"
    return f"safedreamer: {text}\n"


# --- agents of one set of packages on the other -----------------------------------------------------


def test_each_was_recorded_on_its_own() -> None:
    classic, modern = (made_with(agent(name))[0].versions for name in STACKS)
    assert (classic["mujoco"], classic["jax"]) == ("2.3.3", "0.6.2")
    assert classic["python"].startswith("3.11.")
    assert modern["mujoco"].startswith("3.")
    assert modern["python"] >= "3.12"


@pytest.mark.parametrize("name", STACKS)
def test_they_act_here_as_there(name: str) -> None:
    loaded = evaluate.load(agent(name))
    assert loaded.meta["updates"] > 5
    with np.load(DATA / name / ACTED) as file:
        there = file["actions"]
        seen = {key.removeprefix("obs/"): file[key] for key in file.files if key != "actions"}
    assert np.abs(there).max() > 0.1  # an agent that does nothing would be easy to equal
    np.testing.assert_allclose(act(loaded, seen), there, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", STACKS)
def test_they_are_played_and_another_mujoco_is_named(name: str, says: Callable[..., Any]) -> None:
    out, err = says("eval", agent(name), "--episodes", 1, "--json")
    assert err == sentence(name)
    summary = json.loads(out)
    assert summary["length"] == 1_000
    assert recorded(summary["trained_on"]) == made_with(agent(name))
    assert summary["played_on"] == versions.here()


def test_the_sets_have_different_mujocos() -> None:
    assert sentence(OTHER)
    assert not sentence(stack.stack())


def test_random_actions_were_trained_nowhere(says: Callable[..., Any]) -> None:
    out, err = says("eval", agent(OTHER), "--episodes", 1, "--json", "--random")
    assert (json.loads(out)["trained_on"], err) == ([], "")


@pytest.mark.timeout(900)  # it compiles all that a training needs
def test_a_run_goes_on_on_another_set(run_of: Callable[..., Path], says: Callable[..., Any]) -> None:
    run = run_of(OTHER)
    began = made_with(agent(OTHER))
    _, err = says("train", "--resume", run, "--env-steps", 5_200)
    assert sentence(OTHER) in err
    newest = checkpoint.latest(run / runs.CHECKPOINTS)
    assert newest is not None
    assert checkpoint.read_meta(newest)["updates"] > checkpoint.read_meta(agent(OTHER))["updates"]
    at = checkpoint.read_meta(agent(OTHER))["env_steps"]
    both = [*began, Stretch(at, versions.here())]
    assert made_with(newest) == both
    assert json.loads((run / runs.VERSIONS).read_text()) == as_json(both)

    result = results.collect(run, 1, 0)  # and the evidence for docs/results names both, too
    assert result["trained_on"] == as_json(both)
    assert result["played_on"] == versions.here()


def test_a_new_run_begins_from_one(
    says: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run", lambda cfg, run, resume: 0)
    for name in STACKS:
        _, err = says("train", "--from-checkpoint", agent(name), "--run-dir", tmp_path / name)
        assert err == sentence(name)


@pytest.mark.parametrize(("exists", "server"), [(True, "reverb"), (False, "auto")])
def test_a_new_run_needs_no_reverb_because_the_old_one_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, server: str
) -> None:
    meta = meta_of(merge(Config(), {"replay": {"server": "reverb"}}, "test"), 1) | {
        "updates": 1,
        "version": 1,
    }
    path = checkpoint.save(tmp_path, 1, {"x": np.ones(2)}, meta)
    monkeypatch.setattr(warm_start.backend, "exists", lambda: exists)
    _, cfg = warm_start.saved_config(path)
    assert cfg.replay.server == server


# --- who writes it down, and when -------------------------------------------------------------------


def test_every_checkpoint_of_a_run_says_so() -> None:
    workers = FakeWorkers()
    drive(workers)
    assert saved_meta(workers)["versions"] == as_json(MADE_WITH)


def note(run: Path, resume: bool = True) -> list[Stretch]:
    made = runs.note_versions(run, resume=resume)
    assert json.loads((run / runs.VERSIONS).read_text()) == as_json(made)
    return made


def save(run: Path, env_steps: int, made: list[Stretch]) -> None:
    meta = meta_of(Config(), env_steps) | {"updates": 1, "version": 1, "versions": as_json(made)}
    checkpoint.save(run / runs.CHECKPOINTS, env_steps, {"x": np.ones(2)}, meta)


def test_a_run_keeps_what_its_checkpoints_were_made_with(tmp_path: Path) -> None:
    here = versions.here()
    assert note(tmp_path, resume=False) == [Stretch(0, here)]
    save(tmp_path, 500, [ELSEWHERE])
    both = [ELSEWHERE, Stretch(500, here)]
    assert note(tmp_path) == both
    save(tmp_path, 900, both)
    assert note(tmp_path) == both
    assert not list(tmp_path.glob(".*"))  # no temporary file


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    (tmp_path / runs.VERSIONS).write_text(json.dumps(as_json([ELSEWHERE])))
    assert note(tmp_path) == [Stretch(0, versions.here())]


def test_old_checkpoints_said_nothing(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert note(run) == [Stretch(2_000, versions.here())]


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the run directory {tmp_path}/nowhere cannot be written"):
        runs.note_versions(tmp_path / "nowhere", resume=False)


def test_a_run_in_which_nothing_was_trained_leaves_none(tmp_path: Path) -> None:
    run = runs.create(tmp_path / "run", Config())
    note(run, resume=False)
    runs.discard_unused(run)
    assert not run.exists()
