import dataclasses

import pytest

from common.config import ReplayConfig
from common.types import ArraySpec, UserError
from replay.storage import KEEP, CheckpointStore
from replay.table import table_spec


@pytest.fixture
def spec(streams):
    return table_spec(
        streams.signature, ReplayConfig(), batch_length=8, train_ratio=16.0, batch_size=4, min_steps=20
    )


def save(store: CheckpointStore, content: str):
    saved = store.scratch / f"2026-01-01T00:00:00-{content}"
    saved.mkdir()
    (saved / "chunks.tfrecord").write_text(content)
    return store.adopt(saved)


def test_the_newest_wins_and_old_ones_go(tmp_path, spec):
    store = CheckpointStore(tmp_path, spec)
    paths = [save(store, str(n)) for n in range(4)]
    restored, skipped = CheckpointStore(tmp_path, spec).newest()
    assert restored == paths[-1]
    assert skipped == []
    assert (paths[-1] / "chunks.tfrecord").read_text() == "3"
    assert store.complete() == paths[::-1][:KEEP]
    assert list(store.scratch.iterdir()) == []


def test_an_interrupted_save_is_swept_away(tmp_path, spec):
    store = CheckpointStore(tmp_path, spec)
    kept = save(store, "whole")
    (store.scratch / "half").mkdir()
    store = CheckpointStore(tmp_path, spec)
    assert list(store.scratch.iterdir()) == []
    assert store.newest() == (kept, [])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, spec, damage):
    store = CheckpointStore(tmp_path, spec)
    first, second = save(store, "first"), save(store, "second")
    file = second / "chunks.tfrecord"
    match damage:
        case "flip":
            file.write_text("sEcond")
        case "truncate":
            file.write_text("sec")
        case "delete":
            file.unlink()
        case _:
            (second / "manifest.json").unlink()
    restored, skipped = store.newest()
    assert restored == first
    assert len(skipped) == 1
    assert str(second) in skipped[0]


def test_nothing_intact_means_an_empty_start(tmp_path, spec):
    store = CheckpointStore(tmp_path, spec)
    assert store.newest() == (None, [])
    (save(store, "x") / "chunks.tfrecord").write_text("y")
    restored, skipped = store.newest()
    assert restored is None
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"max_size": 5}, "replay.capacity"),
        ({"stride": 2}, "replay.stride"),
        ({"batch_length": 9}, "learner.batch_length"),
        ({"samples_per_insert": 1.0}, "learner.train_ratio"),
        ({"signature": {"vector": ArraySpec((4,))}}, "observations and actions"),
    ],
)
def test_another_definition_is_refused_by_name(tmp_path, spec, change, setting):
    save(CheckpointStore(tmp_path, spec), "x")
    other = CheckpointStore(tmp_path, dataclasses.replace(spec, **change))
    with pytest.raises(UserError, match=f"another {next(iter(change))}.*{setting}"):
        other.newest()


def test_another_format_is_refused(tmp_path, spec, monkeypatch):
    save(CheckpointStore(tmp_path, spec), "x")
    monkeypatch.setattr("replay.storage.FORMAT", 2)
    with pytest.raises(UserError, match="another format"):
        CheckpointStore(tmp_path, spec).newest()


def test_more_environments_may_resume(tmp_path, spec):
    """The widths of the limiter follow the number of actors, which may change on resume."""
    path = save(CheckpointStore(tmp_path, spec), "x")
    other = dataclasses.replace(spec, min_size=99, inserts_ahead=1e6, samples_ahead=50.0)
    assert CheckpointStore(tmp_path, other).newest() == (path, [])


def test_a_directory_that_can_not_be_made_is_refused(tmp_path, spec):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can not be kept in"):
        CheckpointStore(tmp_path / "file" / "replay", spec)
