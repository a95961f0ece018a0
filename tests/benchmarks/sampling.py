"""Replays side by side, their limiters wide open: what a step and a batch cost, and whether training waits.

Reverb's server in a process of its own, a table in the memory of this process, and one in another process
through Ray. CPU times are those of all processes together. Also: what a step takes in memory, and for how
long a save keeps samplers waiting.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from actors.vector_env import SafetyVectorEnv
from common import configuration, memory
from common.config import Config
from common.types import EnvSpec, Writer
from deploy import wiring
from deploy.light_parts import ReplayInMemory
from deploy.local import start_ray
from deploy.replay_link import RayLink
from learner.learner import Learner
from replay import backend
from replay.memory.link import DirectLink
from replay.memory.server import MemoryServer
from replay.memory.table import Lane
from replay.process import spawn_server
from replay.sampler import BatchSampler
from tests.benchmarks.measure import Row

TASK = "SafetyPointGoal1-v0"
STREAMS = 8
STEPS = {"coordinates": 20_000, "vision": 2_000}  # agent steps in replay
BATCHES = {"coordinates": 800, "vision": 40}
BATCH, LENGTH = 16, 64  # as published
BATCH_TARGETS = {"coordinates": "< 0.2", "vision": "< 6"}  # ms, in this process
INSERT_TARGET = "< 10"  # us, of vectors
WAITING_TARGET, SECONDS = 3, 15.0
SAVED_STEPS, PAUSE_TARGET = 200_000, 100  # ms
FRAMES_TARGET = 14  # GB for a million steps

Opened = tuple[Sequence[Writer], Any, EnvSpec]  # writers, what leads to the replay, the environment


def run() -> Iterator[Row]:
    """Every replay there is on this Python, with vectors and with two cameras."""
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        start_ray(100_000_000)
        for observation in STEPS:
            steps = _recorded(observation)
            for name, server, compression, opened in _replays(observation):
                cfg = _config(observation, server, compression)
                with opened(cfg) as found:
                    yield from _costs(f"{observation}, {name}", cfg, found, steps, "this" in name)
        cfg = _config("coordinates", "memory", "none", nano=True)
        with _in_this_process(cfg) as found:
            _fill(found[0], _recorded("coordinates"), STEPS["coordinates"])
            yield _training(cfg, found)
    yield from _memory()
    yield _pause()


def _replays(observation: str) -> Iterator[tuple[str, str, str, Callable[[Config], Any]]]:
    if backend.exists():
        yield "Reverb", "reverb", "none", _reverb
    for compression in ("none", "lz4")[: 1 if observation == "coordinates" else 2]:
        kind = "" if observation == "coordinates" else {"none": ", raw", "lz4": ", LZ4"}[compression]
        yield f"in this process{kind}", "memory", compression, _in_this_process
        yield f"through Ray{kind}", "memory", compression, _through_ray


def _config(observation: str, server: str, compression: str, nano: bool = False) -> Config:
    cfg = configuration.load(method="bsrp_lag", size="nano", task=TASK, observation=observation)
    changes: dict[str, Any] = {
        "replay": {"server": server, "compression": compression, "stride": 1, "capacity": 400_000},
        # Whoever writes waits for nobody before the prefill is done, whoever reads waits for nobody after it.
        "learner": {"train_ratio": 1e9, "prefill": STEPS[observation] + STEPS[observation] // 4},
    }
    if not nano:
        changes["learner"] |= {"batch_size": BATCH, "batch_length": LENGTH}
    return configuration.merge(cfg, changes, "benchmark")


def _arguments(cfg: Config, spec: EnvSpec) -> dict[str, Any]:
    return wiring.replay_arguments(cfg, spec, 0) | {"streams": STREAMS}


def replay_for(cfg: Config) -> AbstractContextManager[Opened]:
    """What a run would write to on this Python, within this process and its children."""
    server = "reverb" if backend.exists() else "memory"
    cfg = configuration.merge(
        cfg, {"replay": {"server": server}, "learner": {"train_ratio": 1.0}}, "benchmark"
    )
    return _reverb(cfg) if server == "reverb" else _in_this_process(cfg)


@contextmanager
def _reverb(cfg: Config) -> Iterator[Opened]:
    spec = wiring.spec_of(cfg)
    server = spawn_server(**_arguments(cfg, spec))
    try:
        address = f"localhost:{server.port}"
        yield wiring.stream_writers(cfg, spec, address, 0, lambda: False), address, spec
    finally:
        server.stop()


@contextmanager
def _in_this_process(cfg: Config) -> Iterator[Opened]:
    spec = wiring.spec_of(cfg)
    server = MemoryServer(**_arguments(cfg, spec))
    link = DirectLink(lambda: server.table)
    _open_wide(server)
    yield wiring.stream_writers(cfg, spec, link, 0, lambda: False), link, spec
    server.stop()


def _open_wide(server: MemoryServer) -> None:
    """Neither side waits for the other, nor for a prefill."""
    wide = {"min_size": 1, "inserts_ahead": float("inf"), "samples_ahead": float("inf")}
    server.table.spec = dataclasses.replace(server.spec, **wide)


class _Replay(ReplayInMemory):
    def __init__(self, arguments: dict[str, Any]):
        super().__init__(arguments)
        _open_wide(self.server)

    def pid(self) -> int:
        return os.getpid()


@contextmanager
def _through_ray(cfg: Config) -> Iterator[Opened]:
    spec = wiring.spec_of(cfg)
    options = {"num_cpus": 0, "max_concurrency": 6, "runtime_env": {"env_vars": memory.KEEP_FREED}}
    handle = ray.remote(_Replay).options(**options).remote(_arguments(cfg, spec))
    link, process = RayLink(handle, "replay0"), psutil.Process(ray.get(handle.pid.remote()))
    yield wiring.stream_writers(cfg, spec, link, 0, lambda: False), link, spec
    ray.kill(handle)
    process.wait(30)  # its CPU time must not vanish while the next replay is measured


def _recorded(observation: str) -> list[list[dict[str, Any]]]:
    """Real steps, [time][environment], of robots that drive: how well frames compress depends on it."""
    env = SafetyVectorEnv(TASK, observation, 5, STREAMS, seed=0)
    rng, found = np.random.default_rng(0), []
    actions = np.zeros((STREAMS, 2), np.float32)
    for at in range(100):
        if at % 10 == 0:
            actions = rng.uniform(-1, 1, (STREAMS, 2)).astype(np.float32)
        step = env.step(actions)
        arrays = {
            **step.obs,
            "reward": step.reward,
            "cost": step.cost,
            "is_first": step.is_first,
            "is_last": step.is_last,
            "is_terminal": step.is_terminal,
            "version": np.zeros(STREAMS, np.int32),
            "action": actions,
        }
        found.append([{name: array[i] for name, array in arrays.items()} for i in range(STREAMS)])
    env.close()
    return found


def _fill(writers: Sequence[Writer], steps: list[list[dict[str, Any]]], count: int) -> None:
    for rows in itertools.islice(itertools.cycle(steps), count // STREAMS):
        for writer, step in zip(writers, rows, strict=True):
            writer.append(step)


def _cpu() -> float:
    """Seconds of this process and all below it."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def _costs(
    name: str, cfg: Config, opened: Opened, steps: list[list[dict[str, Any]]], here: bool
) -> Iterator[Row]:
    writers, reach, spec = opened
    count = STEPS[cfg.env.observation]
    _fill(writers, steps, count // 4)
    cpu = _cpu()
    _fill(writers, steps, count)
    insert = 1e6 * (_cpu() - cpu) / count
    for writer in writers:
        writer.close()
    vectors = cfg.env.observation == "coordinates"
    yield Row(
        "sampling", f"{name}: a step inserted", insert, "us CPU", INSERT_TARGET if here and vectors else ""
    )
    sampler = wiring.batch_sampler(cfg, spec, [reach])
    assert isinstance(sampler, BatchSampler)
    for _ in range(20):  # what is fetched ahead
        assert sampler.next(60.0) is not None
    batches = BATCHES[cfg.env.observation]
    cpu, started = _cpu(), time.monotonic()
    for _ in range(batches):
        assert sampler.next(60.0) is not None
    used, wall = 1e3 * (_cpu() - cpu) / batches, time.monotonic() - started
    sampler.close()
    target = BATCH_TARGETS[cfg.env.observation] if here else ""
    yield Row("sampling", f"{name}: a batch", used, "ms CPU", target, f"{batches / wall:.0f} batches/s")


def _training(cfg: Config, opened: Opened) -> Row:
    _, link, spec = opened
    sampler = wiring.batch_sampler(cfg, spec, [link])
    learner = Learner(wiring.train_step(cfg, spec), sampler.next, lambda *_: None, Path())
    learner.compile()
    before = learner.run(3.0)
    report = learner.run(SECONDS)
    sampler.close()
    note = f"{(report.updates - before.updates) / report.seconds:.1f} updates/s"
    waiting = 100 * report.waited_seconds / report.seconds
    return Row("sampling", "nano coordinates: learner waits", waiting, "%", f"< {WAITING_TARGET}", note)


def _memory() -> Iterator[Row]:
    """Bytes that the steps of two cameras take in a table, for a million of them."""
    steps = _recorded("vision")
    for compression in ("none", "lz4"):
        cfg = _config("vision", "memory", compression)
        server = MemoryServer(**_arguments(cfg, wiring.spec_of(cfg)))
        _open_wide(server)
        link = DirectLink(lambda server=server: server.table)
        _fill(wiring.stream_writers(cfg, wiring.spec_of(cfg), link, 0, lambda: False), steps, 8_000)
        taken = sum(map(_bytes, server.table.lanes)) / sum(lane.written for lane in server.table.lanes)
        target = f"< {FRAMES_TARGET}" if compression == "lz4" else ""
        yield Row("sampling", f"a million steps of two cameras, {compression}", taken / 1e3, "GB", target)


def _bytes(lane: Lane) -> int:
    """Of the steps in a lane, with what Python adds to every compressed frame."""
    total = 0
    for column in lane.columns:
        if isinstance(column, list):
            total += sum(sys.getsizeof(frame) + 8 for frame in column[: lane.written])
        else:
            total += column[: lane.written].nbytes
    return total


def _pause() -> Row:
    """The longest that a sampler waits for a small batch while a large table is saved."""
    cfg = _config("coordinates", "memory", "none")
    spec, waits, done = wiring.spec_of(cfg), [], threading.Event()
    with tempfile.TemporaryDirectory() as directory:
        server = MemoryServer(**_arguments(cfg, spec), checkpoint_dir=Path(directory))
        _open_wide(server)
        link = DirectLink(lambda: server.table)
        writers = wiring.stream_writers(cfg, spec, link, 0, lambda: False)
        _fill(writers, _recorded("coordinates"), SAVED_STEPS)

        def save() -> None:
            server.checkpoint()
            done.set()

        threading.Thread(target=save).start()
        started = time.monotonic()
        while not done.is_set():
            before = time.monotonic()
            server.table.draw(BATCH, 1, 10.0)
            waits.append(time.monotonic() - before)
        note = f"saved in {time.monotonic() - started:.1f} s"
    return Row(
        "sampling",
        f"longest wait while {SAVED_STEPS:,} steps are saved",
        1e3 * max(waits),
        "ms",
        f"< {PAUSE_TARGET}",
        note,
    )
