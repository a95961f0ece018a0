"""The sampler against a full replay server whose limiter never holds: does training wait for batches?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from common import configuration
from common.config import Config
from common.types import ArraySpec, EnvSpec, replay_spec
from deploy import wiring
from learner.learner import Learner
from replay.process import ServerProcess, spawn_server
from replay.sampler import BatchSampler
from replay.writer import StreamWriter
from tests.benchmarks.measure import Row

WAITING_TARGET = 3  # %
STEPS = {"coordinates": 20_000, "vision": 2_000}  # agent steps in replay
SECONDS = 15.0
BATCHES = {"coordinates": 300, "vision": 40}
STREAMS = 8


def run() -> Iterator[Row]:
    """Waiting share of training at nano size, then what a batch costs, also at the published sizes."""
    for observation in STEPS:
        for size in ("nano", "paper"):
            cfg = configuration.load(
                method="bsrp_lag", size=size, task="SafetyPointGoal1-v0", observation=observation
            )
            with _filled(cfg) as (spec, server, sampler):
                yield from _cost(f"{size} {observation}", server, sampler, BATCHES[observation])
                if size == "nano":
                    yield _training(cfg, spec, sampler, observation)


@contextmanager
def _filled(cfg: Config) -> Iterator[tuple[EnvSpec, ServerProcess, BatchSampler]]:
    spec = wiring.spec_of(cfg)
    signature, length, steps = replay_spec(spec), cfg.learner.batch_length, STEPS[cfg.env.observation]
    server = spawn_server(
        signature,
        cfg.replay,
        batch_length=length,
        train_ratio=1e9,
        batch_size=cfg.learner.batch_size,
        min_steps=steps,  # who writes must not wait for who reads
        streams=STREAMS,
    )
    sampler = None
    try:
        address = f"localhost:{server.port}"
        writers = [StreamWriter(address, signature, cfg.replay, length) for _ in range(STREAMS)]
        rng = np.random.default_rng(0)
        for _ in range(steps // STREAMS):
            step = {name: _array(rng, array) for name, array in signature.items()}
            for writer in writers:
                writer.append(step)
        for writer in writers:
            writer.close(timeout=30.0)
        sampler = BatchSampler(
            address, signature, batch_size=cfg.learner.batch_size, batch_length=cfg.learner.batch_length
        )
        yield spec, server, sampler
    finally:
        if sampler is not None:
            sampler.close()
        server.stop()


def _array(rng: np.random.Generator, spec: ArraySpec) -> np.ndarray:
    """Noise; images of plain areas with a little of it, so that they compress about as frames do."""
    if len(spec.shape) == 3:
        areas = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        return areas + (rng.random(spec.shape) < 0.1).astype(np.uint8)
    return np.asarray(rng.normal(size=spec.shape)).astype(spec.dtype)


def _cost(name: str, server: ServerProcess, sampler: BatchSampler, batches: int) -> Iterator[Row]:
    """What a batch costs both sides while nobody trains."""
    sampler.next(60.0)
    process = psutil.Process(server.pid)
    cpu, theirs, started = time.process_time(), process.cpu_times(), time.monotonic()
    for _ in range(batches):
        assert sampler.next(60.0) is not None
    ours, wall = time.process_time() - cpu, time.monotonic() - started
    served = sum(process.cpu_times()[:2]) - sum(theirs[:2])
    note = f"{batches / wall:.0f} batches/s"
    yield Row("sampling", f"{name} batch, learner's side", 1e3 * ours / batches, "ms CPU", note=note)
    yield Row("sampling", f"{name} batch, server's side", 1e3 * served / batches, "ms CPU")


def _training(cfg: Config, spec: EnvSpec, sampler: BatchSampler, observation: str) -> Row:
    learner = Learner(wiring.train_step(cfg, spec), sampler.next, lambda *_: None, Path())
    learner.compile()
    before = learner.run(3.0)
    report = learner.run(SECONDS)
    note = f"{(report.updates - before.updates) / report.seconds:.1f} updates/s"
    waiting = 100 * report.waited_seconds / report.seconds
    return Row("sampling", f"nano {observation} learner waits", waiting, "%", f"< {WAITING_TARGET}", note)
