"""Configuration files that somebody else wrote: with --config, and as the config.yaml of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import Config
from common.metrics import EPISODES, METRICS
from deploy import run_dir as runs


def laughs(merge: str) -> str:
    """Nine lines that stand for a thousand million values."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 10):
        parts = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {{{merge}: [{parts}]}}")
    return "\n".join(lines)


MARKER = "marker-of-the-attack"
HOSTILE: dict[str, bytes] = {
    "python object": f"seed: !!python/object/apply:os.system ['touch {MARKER}']".encode(),
    "python name": b"seed: !!python/name:os.system",
    "python module": b"!!python/module:os",
    "new object": b"seed: !!python/object/new:type {args: [z, [], {}], state: {}}",
    "unknown tag": b"seed: !" + b"x" * 50_000 + b" 1",
    "alias bomb": laughs("x").encode(),
    "merge bomb": laughs("<<").encode(),
    "endless alias": b"seed: &s [*s]",
    "alias of the whole": b"&a {env: *a}",
    "deep lists": b"seed: " + b"[" * 30_000,
    "deep groups": "\n".join(" " * level + "env:" for level in range(400)).encode(),
    "huge whole number": b"seed: " + b"9" * 40_000,
    "large whole number": b"seed: " + b"9" * 4_000,
    "large negative number": b"seed: -" + b"9" * 4_000,
    "large number for a float": b"learner: {train_ratio: " + b"9" * 4_000 + b"}",
    "infinite number": b"learner: {train_ratio: 1e999}",
    "infinite count": b"env_steps: 1e999",
    "seed beyond 32 bits": b"seed: 2147483648",
    "giant network": b"world_model: {deter: 2000000000}",
    "large network": b"world_model: {deter: 900000, units: 900000}",
    "impossible date": b"seed: 2001-99-99",
    "date": b"seed: 2001-01-01",
    "base 60": b"seed: 1:99:99:99:99:99:99:99:99:99:99:99:99:99:99:99:99",
    "NUL": b"seed: 1\0",
    "binary": bytes(range(256)) * 4,
    "not UTF-8": b"task: \xff\xfe",
    "escape codes": b'"\\e]0;owned\\a\\e[2J": 1',
    "escape codes in a value": b'method: "\\e[2Jowned"',
    "50 MB": b"# nothing but a comment\n" * 2_200_000,
    "many keys": b"\n".join(b"a%d: 1" % i for i in range(10_000)),
    "a list": b"- seed\n- 1",
    "a word": b"seed",
    "a number": b"1",
    "a set": b"!!set {seed, task}",
    "number as a key": b"1: 2",
    "nothing as a key": b"null: 2",
    "list as a key": b"? [seed]\n: 2",
    "mapping as a key": b"? {seed: 1}\n: 2",
    "key twice": b"seed: 1\nseed: 2",
    "key twice in another spelling": b'seed: 1\n"seed": 2',
    "group as a value": b"seed: {a: 1}",
    "value as a group": b"env: 1",
    "list as a value": b"task: [SafetyPointGoal1-v0]",
    "list as a choice": b"backend: [local]",
    "group as a choice": b"backend: {local: 1}",
    "two documents": b"seed: 1\n---\nseed: 2",
    "other replay host": b'replay: {host: "$(id)"}',
    "preset elsewhere": b"method: ../../secret",
}


@pytest.fixture(params=list(HOSTILE))
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(HOSTILE[request.param])
    return path


def test_a_hostile_file_for_config(hostile: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    refused("train", "--config", hostile, "--backend", "inline")
    assert not list(tmp_path.rglob(MARKER))
    assert not list(tmp_path.rglob(runs.CONFIG)), "a run was made"


def test_a_hostile_configuration_of_a_run(
    hostile: Path, refused: Callable[..., str], tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    run = runs.create(tmp_path / "run", tiny_config())
    hostile.rename(run / runs.CONFIG)
    refused("train", "--resume", run)
    assert not list(tmp_path.rglob(MARKER))
    assert {path.name for path in run.iterdir()} <= {runs.CONFIG, runs.LOCK}


def test_the_sentence_names_the_file(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for name in ("python object", "deep lists", "escape codes", "50 MB", "huge whole number"):
        path.write_bytes(HOSTILE[name])
        assert str(path) in refused("train", "--config", path)


def test_a_link_in_a_run_is_not_written_through(
    refused: Callable[..., str], tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    for name in (METRICS, EPISODES, runs.REPLAY, runs.REPLAY_LOG, runs.CHECKPOINTS, "tensorboard", "wandb"):
        run = runs.create(tmp_path / f"run with {name}", tiny_config())
        mine = tmp_path / f"mine {name}"
        (run / name).symlink_to(mine)
        assert f"{run / name} is a symbolic link" in refused("train", "--resume", run)
        assert not mine.exists()
