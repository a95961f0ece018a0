"""The table in memory by itself: rings, streams that break, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import ReplayConfig
from common.manifest import MANIFEST, write_manifest
from common.types import UserError
from replay.memory import files, writer
from replay.memory.frames import compress, decompress, joined, split
from replay.memory.link import DirectLink
from replay.memory.server import MemoryServer
from replay.memory.source import MemorySource
from replay.memory.table import Gone, StreamTaken
from replay.memory.writer import stream_writers
from replay.sampler import BatchSampler
from tests.stacks import needs_reverb

LENGTH = 8
UNLIMITED = {"inserts_ahead": float("inf"), "samples_ahead": float("inf")}


@pytest.fixture(params=["none", "lz4"])
def make(request, streams) -> Callable[..., MemoryServer]:
    def make(cfg: ReplayConfig | None = None, **overrides: Any) -> MemoryServer:
        """Its limiter holds nobody unless a `train_ratio` is given."""
        compression = overrides.pop("compression", request.param)
        cfg = dataclasses.replace(cfg or ReplayConfig(capacity=10_000), compression=compression)
        table = {"batch_length": LENGTH, "train_ratio": 16.0, "batch_size": 4, "min_steps": 8}
        server = MemoryServer(streams.signature, cfg, **{**table, **overrides})
        if "train_ratio" not in overrides:
            server.table.spec = dataclasses.replace(server.spec, **UNLIMITED)
        return server

    return make


def writers_of(server: MemoryServer, streams, numbers=(0,), **more: Any) -> list[writer.MemoryWriter]:
    cfg = ReplayConfig(compression="lz4" if server.table.compressed else "none", stride=server.spec.stride)
    return stream_writers(
        DirectLink(lambda: server.table), streams.signature, cfg, LENGTH, list(numbers), **more
    )


def write(server: MemoryServer, streams, steps: int, numbers=(0,), first: int = 0) -> None:
    group = writers_of(server, streams, numbers)
    for counter in range(first, first + steps):
        for number, each in zip(numbers, group, strict=True):
            each.append(streams.make_step(number, counter))
    group[0].close()


def drawn(server: MemoryServer, streams, count: int = 4, batch_size: int = 8) -> list[dict[str, np.ndarray]]:
    source = MemorySource(
        DirectLink(lambda: server.table), streams.signature, batch_size=batch_size, batch_length=LENGTH
    )
    found = [source.read(threading.Event()) for _ in range(count)]
    assert all(batch is not None for batch in found)
    batches = [batch for batch in found if batch is not None]
    for batch in batches:
        streams.check_batch(batch)
    return batches


def starts(server: MemoryServer, streams, stream: int = 0) -> set[int]:
    """First counters of all windows of a stream."""
    windows = [(lane, int(start)) for lane in server.table.lanes for start in lane.all_starts()[: lane.size]]
    source = MemorySource(
        DirectLink(lambda: None), streams.signature, batch_size=len(windows), batch_length=LENGTH
    )
    (batch,) = source._unpacked(1, server.table._copy(windows))
    streams.check_batch(batch)
    return set(batch["counter"][:, 0][batch["stream"][:, 0] == stream].tolist())


# ------------------------------------------------------------------------------------- rings, sampling


def test_the_oldest_windows_leave_and_those_that_stay_are_whole(make, streams):
    server = make(ReplayConfig(capacity=40), streams=2)
    write(server, streams, 500, numbers=(0, 1))
    assert server.info() == dataclasses.replace(server.info(), size=40, inserted=2 * (500 - LENGTH + 1))
    assert starts(server, streams, 0) == set(range(500 - LENGTH - 19, 500 - LENGTH + 1))
    assert starts(server, streams, 1) == starts(server, streams, 0)


def test_every_window_is_drawn_as_often(make, streams):
    server = make(streams=2)
    write(server, streams, 27, numbers=(0,))  # 20 windows
    write(server, streams, 12, numbers=(1,))  # 5
    seen = Counter(
        (int(s), int(c))
        for batch in drawn(server, streams, 50, 50)
        for s, c in zip(batch["stream"][:, 0], batch["counter"][:, 0], strict=True)
    )
    assert len(seen) == 25
    expected = 2500 / 25
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < 61  # 24 degrees of freedom: exceeded once in 20,000


def test_a_batch_belongs_to_whoever_got_it(make, streams):
    server = make(ReplayConfig(capacity=20))
    write(server, streams, 20)
    (batch,) = drawn(server, streams, 1)
    before = {name: array.copy() for name, array in batch.items()}
    write(server, streams, 200, first=1000)
    assert all((batch[name] == before[name]).all() for name in batch)


def test_streams_need_not_be_stepped_together(make, streams):
    server = make(streams=2)
    fast, slow = writers_of(server, streams, (0, 1))
    for counter in range(50):
        fast.append(streams.make_step(0, counter))
        if counter % 5 == 0:
            slow.append(streams.make_step(1, counter // 5))
    fast.close()
    assert (fast.items, slow.items) == (50 - LENGTH + 1, 10 - LENGTH + 1)
    assert server.info().inserted == fast.items + slow.items
    assert starts(server, streams, 0) == set(range(43))


def test_several_batches_come_with_one_call_as_far_as_the_limiter_allows(make, streams):
    server = make(train_ratio=8.0)  # every window once
    write(server, streams, 25)
    inserted = server.info().inserted  # the limiter has let so many in
    count, columns = server.table.draw(4, 100, 1.0)
    assert count == (inserted - 1 + 3 * 4 + 2 * 16 + 1) // 4  # beyond the prefill's window, and ahead of it
    assert isinstance(columns[0], np.ndarray)
    assert len(columns[0]) == 4 * count
    assert server.info().sampled == 4 * count
    assert server.info().inserted > inserted


# ---------------------------------------------------------------------------------- who writes, who is gone


def test_a_later_writer_takes_over_and_no_window_mixes_the_two(make, streams):
    server = make()
    (old,) = writers_of(server, streams)
    for counter in range(12):
        old.append(streams.make_step(0, counter))
    (new,) = writers_of(server, streams)
    for counter in range(100, 120):
        new.append(streams.make_step(0, counter))
    new.close()
    for counter in range(12, 15):
        old.append(streams.make_step(0, counter))
    with pytest.raises(StreamTaken, match="another writer"):
        old.append(streams.make_step(0, 15))  # fills a block
    found = starts(server, streams)
    assert found == {0} | set(range(100, 113))


class Fragile:
    """A replay that can be taken away and brought back."""

    def __init__(self, server: MemoryServer):
        self.server: MemoryServer | None = server
        self.link = DirectLink(lambda: self.server and self.server.table)


def test_writers_and_samplers_outlive_their_replay(make, streams, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.05)
    caplog.set_level(logging.WARNING)
    first = make(checkpoint_dir=tmp_path)
    replay = Fragile(first)
    cfg = ReplayConfig(compression="lz4" if first.table.compressed else "none")
    stop = threading.Event()
    (stream,) = stream_writers(replay.link, streams.signature, cfg, LENGTH, [0], stop.is_set)
    for counter in range(40):
        stream.append(streams.make_step(0, counter))
    source = MemorySource(replay.link, streams.signature, batch_size=4, batch_length=LENGTH)
    sampler = BatchSampler(source)
    assert sampler.next(5.0) is not None
    first.checkpoint()

    replay.server = None
    done = threading.Event()

    def act() -> None:
        for counter in range(40, 80):
            stream.append(streams.make_step(0, counter))
        stream.close()
        done.set()

    actor = threading.Thread(target=act)
    actor.start()
    deadline = time.monotonic() + 10
    while sampler.server_alive and time.monotonic() < deadline:
        sampler.next(0.2)
    assert not sampler.server_alive
    assert not done.is_set()  # acting waits
    replay.server = second = make(checkpoint_dir=tmp_path)
    actor.join(10)
    assert done.is_set()
    assert stream.items_lost == 0
    assert stream.waited_seconds > 0.05
    sampler.close()
    assert starts(second, streams) >= set(range(40, 73))  # nothing that was acted meanwhile is lost
    assert "Acting waits for the replay, which is gone" in caplog.text
    assert "Acting goes on" in caplog.text


def test_what_waits_for_a_replay_that_never_comes_is_bounded_and_counted(streams, make, monkeypatch, caplog):
    monkeypatch.setattr(writer, "_MAX_UNSENT", 3)
    link = DirectLink(lambda: None)
    (stream,) = stream_writers(link, streams.signature, ReplayConfig(), LENGTH, [0], lambda: True)
    for counter in range(100):
        stream.append(streams.make_step(0, counter))  # told to stop, it does not wait
    stream.close()
    assert stream.items == stream.items_lost == 100
    assert caplog.text.count("which is gone") == 1
    assert "Replay lost 8 steps" in caplog.text


def test_a_replay_that_hangs_is_taken_for_gone(make, streams, monkeypatch, caplog):
    monkeypatch.setattr(writer, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.05)
    server = make()

    class Hanging(DirectLink):
        """Takes the first blocks and never answers."""

        hangs = True

        def append(self, life, block):
            return Future() if self.hangs else super().append(life, block)

    link = Hanging(lambda: server.table)
    cfg = ReplayConfig(compression="lz4" if server.table.compressed else "none")
    patience = [time.monotonic() + 1.0]
    (stream,) = stream_writers(
        link, streams.signature, cfg, LENGTH, [0], lambda: time.monotonic() > patience[0]
    )
    for counter in range(40):
        stream.append(streams.make_step(0, counter))
    link.hangs, patience[0] = False, time.monotonic() + 60
    stream.close(timeout=30)
    assert "no answer for 0 s" in caplog.text
    assert stream.items_lost == 0
    assert starts(server, streams) == set(range(33))


def test_a_table_that_was_started_anew_knows_no_writer(make, streams):
    first, second = make(), make()
    life = first.table.open([0])
    with pytest.raises(Gone):
        second.table.settle(life, [0], 0, 0.0)


def test_windows_that_wait_longer_than_their_steps_are_kept_count_as_lost(make, streams):
    server = make(ReplayConfig(capacity=200), train_ratio=16.0, streams=2)
    write(server, streams, 10, numbers=(1,))  # what can be sampled, whatever becomes of the other stream
    (stream,) = writers_of(server, streams, should_stop=lambda: True)
    for counter in range(500):
        stream.append(streams.make_step(0, counter))
    stream.close()
    assert server.table.lost > 0
    assert server.table.lost + server.info().inserted + server.table.lanes[0].pending == stream.items + 3


# --------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_made_while_the_table_is_used(make, streams, tmp_path, monkeypatch):
    """A piece at a time, so that rings turn round under the hands of whoever saves."""
    monkeypatch.setattr(files, "_PIECE_BYTES", 50_000)  # ten steps
    server = make(ReplayConfig(capacity=300), streams=2, checkpoint_dir=tmp_path)
    write(server, streams, 200, numbers=(0, 1))
    stop = threading.Event()

    def use() -> None:
        counter = 200
        while not stop.is_set():
            write(server, streams, 30, numbers=(0, 1), first=counter)
            drawn(server, streams, 1)
            counter += 30

    other = threading.Thread(target=use)
    other.start()
    saved = [server.checkpoint() for _ in range(5)]
    stop.set()
    other.join(10)
    restored = make(ReplayConfig(capacity=300), streams=2, checkpoint_dir=tmp_path)
    assert restored.restored == saved[-1]
    assert restored.messages == []
    assert 0 < restored.info().size <= 300
    drawn(restored, streams, 50)


def test_steps_that_are_overwritten_meanwhile_are_left_out(make, streams, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE_BYTES", 50_000)
    server = make(ReplayConfig(capacity=100), checkpoint_dir=tmp_path)
    write(server, streams, 500)
    joined_before, turned = np.array, []

    def copied(steps: Any) -> Any:
        if not turned:  # between the first piece and the second, everything but the newest goes
            turned.append(True)
            lane = server.table.lanes[0]
            lane.written += 80
        return list(steps) if isinstance(steps, list) else joined_before(steps)

    monkeypatch.setattr(files, "_copied", copied)
    server.checkpoint()
    restored = make(ReplayConfig(capacity=100), checkpoint_dir=tmp_path)
    assert 0 < restored.info().size < 100
    found = starts(restored, streams)
    assert max(found) == 500 - LENGTH
    assert min(found) > 500 - LENGTH - 99


@pytest.mark.parametrize("others", [1, 3, 8])
def test_another_number_of_environments_goes_on_with_every_window(make, streams, tmp_path, others):
    server = make(streams=4, checkpoint_dir=tmp_path)
    write(server, streams, 100, numbers=range(4))
    write(server, streams, 20, numbers=(2,), first=1000)
    server.checkpoint()
    restored = make(streams=others, checkpoint_dir=tmp_path)
    assert restored.messages == []
    assert restored.info() == server.info()
    for stream in range(4):
        assert starts(restored, streams, stream) == starts(server, streams, stream)


def test_windows_without_room_are_told(make, streams, tmp_path):
    cfg = ReplayConfig(capacity=100)
    server = make(cfg, streams=1, checkpoint_dir=tmp_path)
    write(server, streams, 200)
    server.checkpoint()
    restored = make(cfg, streams=3, checkpoint_dir=tmp_path)  # 33 windows each
    assert restored.info().size == 99
    assert restored.messages == ["Of the replay checkpoint, 1 windows find no room any more."]


@pytest.mark.parametrize("then", ["none", "lz4"])
def test_frames_may_be_kept_otherwise_afterwards(make, streams, tmp_path, then):
    server = make(checkpoint_dir=tmp_path)
    write(server, streams, 60)
    server.checkpoint()
    restored = make(compression=then, checkpoint_dir=tmp_path)
    assert restored.table.compressed == (then == "lz4")
    assert starts(restored, streams) == set(range(53))


def test_a_save_that_fails_leaves_the_older_one_and_no_rubbish(make, streams, tmp_path, monkeypatch):
    server = make(checkpoint_dir=tmp_path)
    write(server, streams, 60)
    kept = server.checkpoint()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(UserError, match=r"could not be saved.*No space left.*--replay\.no-checkpoint"):
        server.checkpoint()
    monkeypatch.undo()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert make(checkpoint_dir=tmp_path).restored == kept


def test_an_interrupted_save_never_replaces_a_good_one(make, streams, tmp_path, monkeypatch):
    server = make(checkpoint_dir=tmp_path)
    write(server, streams, 60)
    kept = server.checkpoint()

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr("replay.storage.write_manifest", die)
    with pytest.raises(Killed):
        server.checkpoint()
    monkeypatch.undo()
    restored = make(checkpoint_dir=tmp_path)
    assert restored.restored == kept
    assert starts(restored, streams) == set(range(53))


def reseal(path: Path) -> None:
    """Hostile files, as their maker would leave them: with a manifest that fits."""
    document = json.loads((path / MANIFEST).read_text())["content"]
    del document["files"]
    (path / MANIFEST).unlink()
    write_manifest(path, document)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    table = json.loads((path / files.TABLE).read_text())
    (path / files.TABLE).write_text(json.dumps(change(table)))


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "no table": lambda path: (path / files.TABLE).unlink(),
    "table is a list": lambda path: rewrite(path, lambda table: [table]),
    "table is no JSON": lambda path: (path / files.TABLE).write_bytes(b"\x80\x04K\x01."),
    "counts are text": lambda path: rewrite(path, lambda table: {**table, "inserted": "many"}),
    "huge lanes": lambda path: rewrite(
        path, lambda table: {**table, "lanes": [{"pieces": [2**60], "windows": 1}]}
    ),
    "more steps than bytes": lambda path: rewrite(
        path, lambda table: {**table, "lanes": [{"pieces": [61], "windows": 53}]}
    ),
    "negative pieces": lambda path: rewrite(
        path, lambda table: {**table, "lanes": [{"pieces": [70, -10], "windows": 53}]}
    ),
    "a window before its steps": lambda path: np.arange(-1, 52).tofile(path / "windows"),
    "a window beyond its steps": lambda path: np.arange(1, 54).tofile(path / "windows"),
    "windows out of order": lambda path: np.arange(53)[::-1].copy().tofile(path / "windows"),
    "truncated rows": lambda path: (path / "column0").write_bytes((path / "column0").read_bytes()[:-1]),
    "truncated frames": lambda path: (path / "column1").write_bytes((path / "column1").read_bytes()[:-1]),
    "no frames": lambda path: (path / "column1").write_bytes(b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_passed_over_in_one_sentence(make, streams, tmp_path, name):
    server = make(checkpoint_dir=tmp_path)
    write(server, streams, 60)
    older, newer = server.checkpoint(), server.checkpoint()
    HOSTILE[name](newer)
    reseal(newer)
    restored = make(checkpoint_dir=tmp_path)
    assert restored.restored == older
    (message,) = restored.messages
    assert str(newer) in message
    assert "is damaged" in message
    assert len(message) < 500
    assert restored.info() == server.info()


@pytest.mark.parametrize("damage", ["noise", "too long", "too short", "zero sizes"])
def test_frames_that_are_none_are_refused(streams, make, tmp_path, damage):
    server = make(compression="lz4", checkpoint_dir=tmp_path)
    write(server, streams, 60)
    older, newer = server.checkpoint(), server.checkpoint()
    frame = np.full((40, 40, 3), 7, np.uint8)
    blocks = {
        "noise": bytes(range(200, 256)),
        "too long": compress(np.concatenate([frame, frame])),
        "too short": compress(frame[:20]),
        "zero sizes": b"",
    }
    kept = (newer / "column1").read_bytes()
    sizes = np.fromfile(newer / "sizes1", np.int64)
    (newer / "column1").write_bytes(blocks[damage] + kept[sizes[0] :])
    sizes[0] = len(blocks[damage])
    sizes.tofile(newer / "sizes1")
    reseal(newer)
    restored = make(compression="lz4", checkpoint_dir=tmp_path)
    assert restored.restored == older
    assert len(restored.messages) == 1


@needs_reverb
def test_neither_server_reads_what_the_other_has_saved(make, streams, tmp_path, reverb, serve_reverb):
    theirs = serve_reverb(checkpoint_dir=tmp_path)
    saved = theirs.checkpoint()
    theirs.stop()
    ours = make(min_steps=20, checkpoint_dir=tmp_path)
    assert ours.restored is None
    assert ours.messages == [
        f'The replay checkpoint {saved} was made with replay.server "reverb", which memory cannot read: '
        "it is passed over, and goes with the 2nd new one."
    ]
    write(ours, streams, 60)
    newer = ours.checkpoint()
    back = serve_reverb(checkpoint_dir=tmp_path)
    assert back.restored == saved
    assert f'{newer} was made with replay.server "memory"' in back.messages[0]


def test_frames_round_trip():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 3, (5, 4, 3), np.uint8) for _ in range(7)]
    packed = joined([compress(frame) for frame in frames])
    out = np.empty((7, 5, 4, 3), np.uint8)
    decompress(packed, out)
    assert (out == np.stack(frames)).all()
    assert [compress(frame) for frame in frames] == split(packed)
