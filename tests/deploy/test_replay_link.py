"""The replay in memory behind Ray: real processes, real shared memory."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from common.config import ReplayConfig
from common.types import ArraySpec
from deploy.light_parts import ReplayInMemory
from deploy.replay_link import RayLink
from replay.memory import writer
from replay.memory.source import MemorySource
from replay.memory.table import Gone, StreamTaken
from replay.memory.writer import stream_writers
from replay.sampler import BatchSampler

SIGNATURE = {"counter": ArraySpec((), "int32"), "image": ArraySpec((64, 64, 3), "uint8")}
LENGTH = 8


class Part(ReplayInMemory):
    """Tells its process."""

    def pid(self) -> int:
        return os.getpid()


def start(directory: Path, compression: Any) -> Any:
    arguments = {
        "signature": SIGNATURE,
        "cfg": ReplayConfig(capacity=5_000, compression=compression),
        "batch_length": LENGTH,
        "train_ratio": 8.0,
        "batch_size": 4,
        "min_steps": 40,
        "streams": 2,
        "checkpoint_dir": directory,
    }
    part = ray.remote(Part).options(num_cpus=0, max_concurrency=4).remote(arguments)
    ray.get(part.start.remote(), timeout=60)
    return part


def write(writers: list[writer.MemoryWriter], first: int, last: int) -> None:
    for counter in range(first, last):
        for each in writers:
            each.append(
                {"counter": np.int32(counter), "image": np.full((64, 64, 3), counter % 251, np.uint8)}
            )


def check(batch: dict[str, np.ndarray]) -> int:
    """The newest step of a batch whose windows must be whole."""
    assert (np.diff(batch["counter"], axis=1) == 1).all()
    assert (batch["image"] == (batch["counter"] % 251)[..., None, None, None]).all()
    return int(batch["counter"].max())


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_writers_and_samplers_follow_a_killed_replay(
    ray_session, tmp_path, monkeypatch, caplog, compression: Any
):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.1)
    first = start(tmp_path, compression)
    link = RayLink(first, "replay0")
    cfg = ReplayConfig(compression=compression)
    patience = [time.monotonic() + 1e9]
    writers = stream_writers(link, SIGNATURE, cfg, LENGTH, [0, 1], lambda: time.monotonic() > patience[0])
    sampler = BatchSampler(MemorySource(link, SIGNATURE, batch_size=4, batch_length=LENGTH))
    try:
        for counter in range(0, 120, 8):
            write(writers, counter, counter + 8)
            while (batch := sampler.next(0.1)) is not None:
                check(batch)
        ray.get(first.checkpoint.remote(), timeout=60)
        os.kill(ray.get(first.pid.remote()), signal.SIGKILL)
        with pytest.raises(Gone, match="its process has ended"):
            link.draw(4, 1, 0.0)
        deadline = time.monotonic() + 30
        while sampler.server_alive and time.monotonic() < deadline:
            sampler.next(0.2)
        assert not sampler.server_alive
        patience[0] = time.monotonic() + 0.5  # a slice of acting ends although nobody answers
        write(writers, 120, 136)

        second = start(tmp_path, compression)
        link.go_to(second)
        patience[0] = time.monotonic() + 1e9
        newest = 0
        for counter in range(136, 200, 8):
            write(writers, counter, counter + 8)
            while (batch := sampler.next(0.2)) is not None:
                newest = max(newest, check(batch))
        assert newest > 150
        assert all(each.items_lost == 0 for each in writers)
        assert "its process has ended" in caplog.text
        assert "Acting goes on" in caplog.text
        ray.kill(second)
    finally:
        sampler.close()


def test_what_goes_wrong_at_the_other_end_is_told(ray_session, tmp_path):
    part = start(tmp_path, "none")
    link = RayLink(part, "replay0")
    with pytest.raises(Gone, match="does not know"):
        link.settle(1, [0], 0, 0.0)
    life = link.open([0])
    link.open([0, 1])
    with pytest.raises(StreamTaken, match="another writer"):
        link.settle(life, [0], 0, 0.0)
    ray.kill(part)
