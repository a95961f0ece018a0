from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import checkpoint
from common.config import Config
from common.configuration import merge
from common.types import UserError
from deploy import run_dir as runs
from tests.deploy.conftest import meta_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_directory_is_made_with_its_configuration(tmp_path):
    cfg = merge(Config(), {"seed": 7, "world_model": {"lr": 1e-7}}, "test")
    run = runs.create(tmp_path / "a" / "b", cfg)
    assert run == tmp_path / "a" / "b"
    assert runs.read_config(run) == cfg
    assert [path.name for path in run.iterdir()] == [runs.CONFIG]  # no temporary file
    with pytest.raises(UserError, match=r"holds a run already; continue it with --resume .*b, or choose"):
        runs.create(run, cfg)


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.create(runs.default_path(Config(seed=3)), Config())
    assert run.is_absolute()
    assert run.parent == tmp_path / "runs" / Config().task
    assert run.name.startswith(f"{Config().method}-{Config().size}-seed3-")


def test_an_existing_empty_directory_will_do(tmp_path):
    assert runs.create(tmp_path, Config()) == tmp_path


def test_a_directory_without_a_configuration_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml"):
            runs.read_config(path)


@pytest.mark.parametrize(
    "change",
    [
        {"env_steps": 5},
        {"backend": "inline"},
        {"actors": {"count": 9, "slice_seconds": 9.0}},
        {"evaluation": {"every": 5, "episodes": 9, "seed": 4}},
        {"checkpoint": {"every_seconds": 5.0, "keep": 9}},
        {"learner": {"devices": 9, "precision": "bfloat16"}},
        {"replay": {"host": "0.0.0.0"}},
        {"logging": {"wandb": "offline", "live": False, "every_seconds": 9.0}},
    ],
)
def test_what_may_change_at_a_resume(change):
    runs.check_resumable(Config(), merge(Config(), change, "test"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"env": {"action_repeat": 9}}, "env.action_repeat"),
        ({"actors": {"envs": 9}}, "actors.envs"),
        ({"method": "osrp"}, "method"),
        ({"safety": {"pid": {"kp": 9.0}}}, "safety.pid.kp"),
        ({"env_steps": 5, "seed": 9}, "seed"),
    ],
)
def test_what_may_not(change, name):
    with pytest.raises(UserError, match=f"^`{name}` cannot change .*saved: .*, given: (9|9.0|osrp)"):
        runs.check_resumable(Config(), merge(Config(), change, "test"))


def test_a_run_is_finished_when_its_newest_checkpoint_has_all_env_steps(tmp_path):
    cfg = Config(env_steps=1_000)
    runs.check_unfinished(tmp_path, cfg)
    for env_steps in (500, 999):
        meta = meta_of(cfg, env_steps) | {"updates": 1, "version": 1}
        checkpoint.save(tmp_path / runs.CHECKPOINTS, env_steps, {"x": np.ones(2)}, meta)
        runs.check_unfinished(tmp_path, cfg)
    meta = meta_of(cfg, 1_040) | {"updates": 2, "version": 2}
    checkpoint.save(tmp_path / runs.CHECKPOINTS, 1_040, {"x": np.ones(2)}, meta)
    with pytest.raises(UserError, match="has its 1040 env steps already; to go on, give --env-steps more"):
        runs.check_unfinished(tmp_path, cfg)
    runs.check_unfinished(tmp_path, dataclasses.replace(cfg, env_steps=2_000))


def test_only_one_process_trains_in_a_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from deploy import run_dir\n"
        "with run_dir.lock(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with runs.lock(tmp_path):
        with (
            pytest.raises(UserError, match=f"another process trains in {tmp_path} right now"),
            runs.lock(tmp_path),
        ):
            pass
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert "another process trains" in second.stderr
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (third.returncode, third.stderr) == (0, "")


def test_a_directory_that_vanished_cannot_be_locked(tmp_path):
    with pytest.raises(UserError, match="cannot be written"), runs.lock(tmp_path / "nowhere"):
        pass


def test_what_was_never_trained_is_discarded(tmp_path):
    run = runs.create(tmp_path / "run", Config())
    with runs.lock(run):
        pass
    (run / runs.REPLAY / "scratch").mkdir(parents=True)
    (run / runs.REPLAY_LOG).write_text("hello")
    (run / "metrics.jsonl").write_text("")
    runs.discard_unused(run)
    assert not run.exists()


@pytest.mark.parametrize("trace", ["metrics.jsonl", f"{runs.CHECKPOINTS}/step_1/manifest.json"])
def test_what_was_trained_stays(tmp_path, trace):
    run = runs.create(tmp_path / "run", Config())
    (run / trace).parent.mkdir(parents=True, exist_ok=True)
    (run / trace).write_text("{}")
    runs.discard_unused(run)
    assert (run / trace).exists()
    assert runs.read_config(run) == Config()


def test_other_peoples_files_stay(tmp_path):
    run = runs.create(tmp_path, Config())
    (tmp_path / "thesis.tex").write_text("...")
    runs.discard_unused(run)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
