"""Batches from two replay servers: even shares, and what happens when one of them is gone."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest

from common.config import ReplayConfig
from replay.sampler import BatchSampler
from replay.server import free_ports, ports_from
from replay.shards import ShardedSampler, batches

CONFIG = ReplayConfig(capacity=10_000)


def fill(kind, server, streams, stream: int, steps: int) -> None:
    writer = kind.writer(server)
    for counter in range(steps):
        writer.append(streams.make_step(stream, counter))
    writer.close()
    assert writer.items_lost == 0


def drawn(sampler, streams, count: int) -> Counter[int]:
    """Windows per stream in so many batches."""
    seen: Counter[int] = Counter()
    for _ in range(count):
        batch = sampler.next(20.0)
        assert batch is not None
        streams.check_batch(batch)
        seen.update(batch["stream"][:, 0].tolist())
    return seen


@pytest.fixture
def two(serve):
    return two_of(serve)


def two_of(serve):
    """Servers whose limiters let hundreds of batches pass."""
    return [serve(train_ratio=1e4, batch_size=2) for _ in range(2)]


def sampler_of(kind, servers, batch_size: int = 4):
    return batches([kind.source(server, batch_size // len(servers)) for server in servers])


def test_every_batch_holds_as_many_windows_of_each_server(kind, two, streams):
    for stream, server in enumerate(two):
        fill(kind, server, streams, stream, 26)
    sampler = sampler_of(kind, two)
    assert isinstance(sampler, ShardedSampler)
    deadline = time.monotonic() + 20
    while not all(part.ready() for part in sampler._samplers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert drawn(sampler, streams, 1) == {0: 2, 1: 2}
    later = drawn(sampler, streams, 50)
    sampler.close()
    assert later[0] == pytest.approx(100, abs=60)  # a part that is late is taken from the other


def test_a_server_without_data_and_one_that_is_killed_hold_nobody_up(reverb, serve_reverb, streams):
    two = two_of(serve_reverb)
    fill(reverb, two[0], streams, 0, 26)
    sampler = sampler_of(reverb, two)
    assert drawn(sampler, streams, 5) == {0: 20}
    fill(reverb, two[1], streams, 1, 26)
    while not drawn(sampler, streams, 1)[1]:
        pass
    os.kill(two[0].pid, signal.SIGKILL)
    deadline, without = time.monotonic() + 20, 0
    while without < 20:  # what was fetched ahead may come late
        without = 0 if drawn(sampler, streams, 1)[0] else without + 1
        assert time.monotonic() < deadline
    began = time.monotonic()
    assert drawn(sampler, streams, 20) == {1: 80}
    assert time.monotonic() - began < 10
    sampler.close()


def test_parts_that_came_in_time_are_kept_for_the_next_call(streams):
    class Once(BatchSampler):
        """Has one part, as soon as it is told."""

        def __init__(self, value: int):
            self.value, self.there = value, False

        def ready(self) -> bool:
            return self.there

        def next(self, timeout: float | None = None):
            there, self.there = self.there, False
            return {"x": np.full((2, 3), self.value)} if there else None

    one, two = Once(1), Once(2)
    sampler = ShardedSampler([one, two])
    one.there = True
    assert sampler.next(0.05) is None
    two.there = True
    batch = sampler.next(0.05)
    assert batch is not None
    assert batch["x"][:, 0].tolist() == [1, 1, 2, 2]


def test_one_server_needs_no_putting_together(kind, two):
    sampler = sampler_of(kind, two[:1])
    assert isinstance(sampler, BatchSampler)
    sampler.close()


def test_ports_follow_the_first_or_differ():
    assert ports_from(dataclasses.replace(CONFIG, port=7000, shards=3), free_ports) == [7000, 7001, 7002]
    assert len(set(ports_from(dataclasses.replace(CONFIG, shards=20), free_ports))) == 20
