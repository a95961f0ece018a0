"""Checkpoints, replay buffers and tables that somebody else wrote: nothing in them runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint, manifest
from common.checkpoint import DamagedCheckpoint
from common.config import Config, ReplayConfig
from common.manifest import MANIFEST, read_manifest, write_manifest
from common.metrics import EPISODES, METRICS
from common.plots import plot_run
from common.sinks import read_jsonl, truncate_jsonl
from common.types import ArraySpec, UserError
from deploy import evaluate, warm_start
from deploy import run_dir as runs
from deploy.cli import main
from replay import backend
from replay.process import spawn_server
from tests.stacks import NO_REVERB

LIKE = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.int32(7)}


class Attack:
    """Whoever unpickles it makes the file."""

    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._marker,)


@pytest.fixture
def attack(tmp_path: Path) -> bytes:
    marker = tmp_path / "works"
    data = pickle.dumps(Attack(marker))
    pickle.loads(data)
    assert marker.exists(), "the attack itself does not work"
    return pickle.dumps(Attack(tmp_path / "attacked"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", 1, LIKE, {"x": 1})


def reseal(path: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> None:
    """A manifest that fits the files as they are now, with its content changed and sealed again."""
    content = {name: value for name, value in read_manifest(path).items() if name != "files"}
    (path / MANIFEST).unlink()
    write_manifest(path, content)
    document = json.loads((path / MANIFEST).read_text())
    change(document["content"])
    document["checksum"] = manifest._checksum(document["content"])
    (path / MANIFEST).write_text(json.dumps(document))


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_pickle_in_place_of_any_file_is_never_loaded(saved: Path, attack: bytes, tmp_path: Path) -> None:
    for file in files_of(saved):
        before, seal = file.read_bytes(), (saved / MANIFEST).read_bytes()
        file.write_bytes(attack)
        with pytest.raises(DamagedCheckpoint):
            checkpoint.restore(saved, LIKE)
        if file.name != MANIFEST:
            reseal(saved)  # as whoever means harm would
            with contextlib.suppress(DamagedCheckpoint):  # not every file is read
                checkpoint.restore(saved, LIKE)
        file.write_bytes(before)
        (saved / MANIFEST).write_bytes(seal)
    assert not (tmp_path / "attacked").exists()
    assert checkpoint.restore(saved, LIKE).step == 1


def test_a_run_of_pickles_is_refused(
    trained: Path, attack: bytes, tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest, older = sorted((run / runs.CHECKPOINTS).iterdir(), reverse=True)
    for file in files_of(newest):
        file.write_bytes(attack)
    (skipped,) = evaluate.load(run).skipped
    assert str(newest) in skipped
    for file in files_of(older):
        file.write_bytes(attack)
    for path in (run, newest, older):
        assert str(path) in refused("eval", path)
        assert str(path) in refused("train", "--from-checkpoint", path)
    assert not (tmp_path / "attacked").exists()


def test_of_a_resealed_pickle_the_older_checkpoint_is_used(
    trained: Path, attack: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest, _ = sorted((run / runs.CHECKPOINTS).iterdir(), reverse=True)
    for file in (newest / checkpoint.ARRAYS).rglob("*"):
        if file.is_file():
            file.write_bytes(attack)
    reseal(newest)
    loaded = evaluate.load(run)
    assert loaded.meta["env_steps"] == 1_000
    assert [sentence for sentence in loaded.skipped if str(newest) in sentence]
    assert not (tmp_path / "attacked").exists()


def set_file(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["files"].update({name: [1, "0" * 64]})


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "above": set_file("../secret"),
    "above, inside": set_file("arrays/../../secret"),
    "absolute": set_file("/etc/hostname"),
    "NUL": set_file("a\0b"),
    "empty name": set_file(""),
    "very long name": set_file("x" * 100_000),
    "size is a word": lambda c: c["files"].update(x=["1", "0"]),
    "size is negative": lambda c: c["files"].update(x=[-1, "0"]),
    "huge size": lambda c: c["files"].update(x=[10**30, "0"]),
    "no pair": lambda c: c["files"].update(x=1),
    "no files": lambda c: c.pop("files"),
    "files are a list": lambda c: c.update(files=["x"]),
    "no arrays": lambda c: c.pop("arrays"),
    "arrays are a list": lambda c: c.update(arrays=[1]),
    "array is a word": lambda c: c["arrays"].update(a="x"),
    "shape is a word": lambda c: c["arrays"]["a"].update(shape="x"),
    "huge shape": lambda c: c["arrays"]["a"].update(shape=[10**30]),
    "objects": lambda c: c["arrays"]["a"].update(dtype="object"),
    "code as a dtype": lambda c: c["arrays"]["a"].update(dtype="__import__('os')"),
    "dtype is a list": lambda c: c["arrays"]["a"].update(dtype=["f4"]),
    "no meta": lambda c: c.pop("meta"),
    "meta is a list": lambda c: c.update(meta=[]),
    "no step": lambda c: c.pop("step"),
    "step is a word": lambda c: c.update(step="1"),
    "other format": lambda c: c.update(format=2),
    "format is a list": lambda c: c.update(format=[[]]),
    "arrays left out": lambda c: c["arrays"].pop("a"),
    "one array more": lambda c: c["arrays"].update(b={"shape": [10**9], "dtype": "float32"}),
    "empty but huge": lambda c: c["arrays"].update(b={"shape": [0, 2**40], "dtype": "float32"}),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest(saved: Path, name: str) -> None:
    reseal(saved, MANIFESTS[name])
    with pytest.raises(UserError) as error:
        checkpoint.restore(saved, LIKE)
    assert len(str(error.value)) < 1_000
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[1]", b"\xff\xfe", b"[" * 200_000, b'{"content": 1, "checksum": 1}', b"9" * 9_999],
)
def test_a_manifest_that_is_no_json_object(saved: Path, text: bytes) -> None:
    (saved / MANIFEST).write_bytes(text)
    with pytest.raises(DamagedCheckpoint) as error:
        checkpoint.restore(saved, LIKE)
    assert len(str(error.value)) < 1_000


def test_a_manifest_without_an_end(saved: Path) -> None:
    with open(saved / MANIFEST, "wb") as file:
        file.truncate(50_000_000_000)  # takes no room on the disk
    with pytest.raises(DamagedCheckpoint, match="larger than"):
        checkpoint.restore(saved, LIKE)


def test_a_file_far_larger_than_its_arrays(saved: Path) -> None:
    def grow(content: dict[str, Any]) -> None:
        content["files"]["arrays/_METADATA"] = [50_000_000_000, "0" * 64]

    reseal(saved, grow)
    os.truncate(saved / "arrays" / "_METADATA", 50_000_000_000)
    with pytest.raises(DamagedCheckpoint, match="far larger than its arrays"):
        checkpoint.restore(saved, LIKE)


def test_links_out_of_a_checkpoint_are_not_followed(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(saved / "arrays", outside)
    metadata = saved / "arrays" / "_METADATA"
    metadata.unlink()
    metadata.symlink_to(outside / "_METADATA")
    with pytest.raises(DamagedCheckpoint, match="_METADATA is no file inside it"):
        checkpoint.restore(saved, LIKE)
    shutil.rmtree(saved / "arrays")
    (saved / "arrays").symlink_to(outside)
    with pytest.raises(DamagedCheckpoint, match="is no file inside it"):
        checkpoint.restore(saved, LIKE)


def test_arrays_stored_with_another_shape_are_not_read(saved: Path, tmp_path: Path) -> None:
    """What would be read is far larger than what the manifest describes."""
    big = checkpoint.save(
        tmp_path / "big", 1, {"a": np.zeros((3_000, 4_000), np.float32), "n": np.int32(7)}, {}
    )
    shutil.rmtree(saved / "arrays")
    shutil.copytree(big / "arrays", saved / "arrays")
    reseal(saved)
    with pytest.raises(DamagedCheckpoint, match="a is stored with another shape than its manifest says"):
        checkpoint.restore(saved, LIKE)


METAS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no configuration": lambda meta: meta.pop("config"),
    "configuration is a list": lambda meta: meta.update(config=[1]),
    "unknown setting": lambda meta: meta["config"].update({"\x1b[2J": 1}),
    "huge network": lambda meta: meta["config"]["world_model"].update(deter=2**31),
    "other task": lambda meta: meta["config"].update(task="../../etc"),
    "env steps are a word": lambda meta: meta.update(env_steps="1"),
    "negative updates": lambda meta: meta.update(updates=-1),
    "no version": lambda meta: meta.pop("version"),
    "no counters": lambda meta: meta.pop("counters"),
    "unknown counter": lambda meta: meta["counters"].update(x=1),
    "counter is a list": lambda meta: meta["counters"].update(env_steps=[1]),
    "counter is infinite": lambda meta: meta["counters"].update(wall_seconds=float("inf")),
}


@pytest.mark.parametrize("name", METAS)
def test_what_a_checkpoint_says_about_itself(
    trained: Path, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for path in (run / runs.CHECKPOINTS).iterdir():
        reseal(path, lambda content: METAS[name](content["meta"]))
    refused("eval", run)
    refused("train", "--from-checkpoint", run)
    refused("train", "--resume", run)


@pytest.mark.parametrize(
    "versions",
    [
        "2.3.3",
        [{"env_steps": 0, "versions": {"mujoco": "\x1b[2J"}}],
        [{"env_steps": 0, "versions": {"mujoco": {"x": []}}}] * 10_000,
    ],
)
def test_versions_that_are_none_are_not_repeated(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], versions: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for path in (run / runs.CHECKPOINTS).iterdir():
        reseal(path, lambda content: content["meta"].update(versions=versions))
    with pytest.raises(SystemExit) as leaving:
        main(["eval", str(run), "--episodes", "1", "--json"])
    out, err = capsys.readouterr()
    assert (leaving.value.code, err) == (0, "")
    assert json.loads(out)["trained_on"] == []
    assert [entry.env_steps for entry in runs.note_versions(run, resume=True)] == [2_000]


# --- where a run begins ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 9_000,
        b"{" + b" " * 20_000 + b"}",
        b'{"checkpoint": 1, "random_steps": 1}',
        b'{"checkpoint": "x", "random_steps": Infinity}',
        b'{"checkpoint": "x", "random_steps": -1}',
        b'{"checkpoint": "x", "random_steps": 1e99}',
        b'{"checkpoint": "\\u0000", "random_steps": 1}',
        b'{"checkpoint": "' + b"x" * 8_000 + b'", "random_steps": 1}',
    ],
)
def test_a_hostile_note_about_the_beginning(tmp_path: Path, text: bytes) -> None:
    (tmp_path / runs.WARM_START).write_bytes(text)
    with pytest.raises(UserError) as error:
        warm_start.read(tmp_path)
    assert len(str(error.value)) < 1_000


# --- tables ---------------------------------------------------------------------------------------

ROWS = (
    b"\x80\x04\x95 a pickle\n",
    b"[" * 200_000 + b"\n",
    b'{"env_steps": "1", "return": 1}\n',
    b'{"env_steps": [], "return": 1}\n',
    b'{"env_steps": Infinity, "return": 1}\n',
    b'{"env_steps": ' + b"9" * 4_000 + b', "return": 1}\n',
    b'{"env_steps": -5, "return": 1}\n',
    b'{"env_steps": true, "return": 1}\n',
    b"[1, 2]\n",
    b"x" * 3_000_000 + b"\n",
    b"\0" * 1_000 + b"\n",
)
ODD_VALUES = b"".join(
    b'{"env_steps": %d, "%s": %s, "%s_std": %s}\n' % (step, name, value, name, value)
    for name in (b"eval/return", b"eval/cost", b"return", b"cost")
    for step, value in enumerate(
        (b'"x"', b"[1]", b"{}", b"true", b"NaN", b"Infinity", b"1e300", b"9" * 4_000, b"null", b"-1"), 1
    )
)


def test_hostile_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    good = b'{"env_steps": 5, "return": 1.0}\n'
    path.write_bytes(good.join((b"", *ROWS, b"")))
    assert read_jsonl(path) == [{"env_steps": 5, "return": 1.0}] * (len(ROWS) + 1)
    truncate_jsonl(path, 10)
    assert path.read_bytes() == good * (len(ROWS) + 1)


def test_a_plot_of_hostile_rows(
    tmp_path: Path, tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.create(tmp_path / "run", tiny_config())
    for name in (METRICS, EPISODES):
        (run / name).write_bytes(b"".join(ROWS) + ODD_VALUES)
    assert plot_run(run, tmp_path / "out.png").stat().st_size > 1_000
    (run / runs.CONFIG).write_bytes(b"safety: " + b"[" * 30_000)
    plot_run(run, tmp_path / "out.png")


# --- replay buffers -------------------------------------------------------------------------------

SIGNATURE = {"x": ArraySpec((3,))}


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    """The replay directory of a run under Reverb, with two checkpoints. (In memory: tests/replay.)"""
    if not backend.exists():
        pytest.skip(NO_REVERB)
    server = start(tmp_path)
    server.checkpoint()
    server.checkpoint()
    server.stop()
    return tmp_path / "replay"


def start(tmp_path: Path) -> Any:
    return spawn_server(
        SIGNATURE,
        ReplayConfig(capacity=100),
        batch_length=4,
        train_ratio=4.0,
        batch_size=2,
        min_steps=50,
        checkpoint_dir=tmp_path / "replay",
        log=tmp_path / "log",
    )


def restored(tmp_path: Path) -> tuple[str | None, list[str]]:
    server = start(tmp_path)
    server.stop()
    return None if server.restored is None else server.restored.name, server.messages


def test_a_replay_buffer_of_pickles_is_passed_over(buffer: Path, attack: bytes, tmp_path: Path) -> None:
    (buffer / "000002" / "tables.tfrecord").write_bytes(attack)
    name, messages = restored(tmp_path)
    assert (name, len(messages)) == ("000001", 1)
    for path in (buffer / "000001", buffer / "000002"):
        for file in files_of(path):
            if file.name != MANIFEST:
                file.write_bytes(attack)
        reseal(path)
    name, messages = restored(tmp_path)
    assert (name, len(messages)) == (None, 2)
    assert all(len(message) < 1_000 for message in messages)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", ["above", "absolute", "huge size", "no files", "files are a list"])
def test_a_hostile_manifest_of_a_replay_buffer(buffer: Path, name: str, tmp_path: Path) -> None:
    reseal(buffer / "000002", MANIFESTS[name])
    found, messages = restored(tmp_path)
    assert (found, len(messages)) == ("000001", 1)


def test_a_replay_buffer_without_its_definition_is_refused(buffer: Path, tmp_path: Path) -> None:
    reseal(buffer / "000002", lambda content: content.update(table=["x"] * 50_000))
    with pytest.raises(UserError, match="was made with another format") as error:
        start(tmp_path)
    assert len(str(error.value)) < 1_500


def test_what_lies_beside_a_replay_buffer_is_left_alone(buffer: Path, tmp_path: Path) -> None:
    """Reverb empties its directory: it must not be somebody else's."""
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    (precious / "file").write_text("mine")
    shutil.rmtree(buffer / "scratch")
    (buffer / "scratch").symlink_to(precious)
    (buffer / "000009").symlink_to(precious)
    (buffer / "foreign").write_bytes(b"x")
    server = start(tmp_path)
    assert server.restored is not None
    assert server.restored.name == "000002"
    for _ in range(4):
        server.checkpoint()
    server.stop()
    assert sorted(path.name for path in precious.iterdir()) == ["file", "sub"]
    assert (precious / "file").read_text() == "mine"
    assert (buffer / "foreign").read_bytes() == b"x"
