from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.config import ReplayConfig
from common.types import ArraySpec
from replay import backend
from replay.memory.link import DirectLink
from replay.memory.server import MemoryServer
from replay.memory.source import MemorySource
from replay.memory.writer import stream_writers
from replay.process import ServerProcess, spawn_server
from replay.reverb_source import ReverbSource
from replay.writer import StreamWriter
from tests.stacks import NO_REVERB, needs_reverb

CONFIG = ReplayConfig(capacity=10_000)
EPISODE = 7  # steps per episode: shorter than a window, so that every window crosses a border
SIGNATURE = {
    "counter": ArraySpec((), "int32"),
    "image": ArraySpec((40, 40, 3), "uint8"),  # too big for the packed row
    "is_first": ArraySpec((), "bool"),
    "stream": ArraySpec((), "int32"),
    "vector": ArraySpec((3,), "float32"),
}


def make_step(stream: int, counter: int) -> dict[str, Any]:
    """Step `counter` of stream number `stream`; every array tells which step it belongs to."""
    return {
        "counter": np.int32(counter),
        "image": np.full((40, 40, 3), counter % 251, np.uint8),
        "is_first": np.bool_(counter % EPISODE == 0),
        "stream": np.int32(stream),
        "vector": np.array([stream, counter, stream + counter], np.float32),
    }


def check_batch(batch: dict[str, np.ndarray]) -> None:
    """Every window is a contiguous piece of exactly one stream, and no array slipped against another."""
    assert list(batch) == sorted(SIGNATURE)
    counter, stream = batch["counter"], batch["stream"]
    lead = counter.shape
    for name, spec in SIGNATURE.items():
        assert batch[name].shape == (*lead, *spec.shape)
        assert batch[name].dtype == np.dtype(spec.dtype)
    assert (np.diff(counter, axis=1) == 1).all()
    assert (stream == stream[:, :1]).all()
    assert (batch["is_first"] == (counter % EPISODE == 0)).all()
    assert (batch["image"] == (counter % 251)[..., None, None, None]).all()
    assert (batch["vector"] == np.stack([stream, counter, stream + counter], -1)).all()


@pytest.fixture
def streams() -> SimpleNamespace:
    """The synthetic streams: `signature`, `make_step(stream, counter)`, `check_batch(batch)`."""
    return SimpleNamespace(signature=SIGNATURE, make_step=make_step, check_batch=check_batch)


TABLE = {"batch_length": 8, "train_ratio": 16.0, "batch_size": 4, "min_steps": 20}


class Reverb:
    """A server in a process of its own, reached at its port."""

    name = "reverb"
    draws_whole_batches = False  # its sampler fetches single windows

    def __init__(self, tmp_path: Path):
        self._log = tmp_path / "server.log"

    def serve(self, cfg: ReplayConfig = CONFIG, **overrides: Any) -> ServerProcess:
        return spawn_server(SIGNATURE, cfg, log=self._log, **{**TABLE, **overrides})

    def writer(self, server: ServerProcess, cfg: ReplayConfig = CONFIG, stream: int = 0, **more: Any) -> Any:
        length = TABLE["batch_length"]
        return StreamWriter(f"localhost:{server.port}", SIGNATURE, cfg, length, **more)

    def source(self, server: ServerProcess, batch_size: int = 4) -> ReverbSource:
        address = f"localhost:{server.port}"
        return ReverbSource(address, SIGNATURE, batch_size=batch_size, batch_length=TABLE["batch_length"])


class Memory:
    """A table in this process."""

    draws_whole_batches = True

    def __init__(self, compression: str):
        self.name = f"memory-{compression}"
        self._compression = compression

    def serve(self, cfg: ReplayConfig = CONFIG, **overrides: Any) -> MemoryServer:
        return MemoryServer(SIGNATURE, self._cfg(cfg), **{**TABLE, **overrides})

    def writer(self, server: MemoryServer, cfg: ReplayConfig = CONFIG, stream: int = 0, **more: Any) -> Any:
        link, length = DirectLink(lambda: server.table), TABLE["batch_length"]
        return stream_writers(link, SIGNATURE, self._cfg(cfg), length, [stream], **more)[0]

    def source(self, server: MemoryServer, batch_size: int = 4) -> MemorySource:
        link = DirectLink(lambda: server.table)
        return MemorySource(link, SIGNATURE, batch_size=batch_size, batch_length=TABLE["batch_length"])

    def _cfg(self, cfg: ReplayConfig) -> ReplayConfig:
        return dataclasses.replace(cfg, compression=self._compression)


@pytest.fixture(params=[pytest.param("reverb", marks=needs_reverb), "memory-none", "memory-lz4"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Reverb | Memory:
    """Both kinds of replay, behind one face: `serve`, `writer`, `source`."""
    server, _, compression = request.param.partition("-")
    return Reverb(tmp_path) if server == "reverb" else Memory(compression)


@pytest.fixture
def serve(kind: Reverb | Memory) -> Iterator[Callable[..., Any]]:
    """Starts a server of that kind; all of them are ended with the test."""
    servers: list[Any] = []

    def start(*args: Any, **overrides: Any) -> Any:
        servers.append(kind.serve(*args, **overrides))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def reverb(tmp_path: Path) -> Reverb:
    """Reverb alone."""
    if not backend.exists():
        pytest.skip(NO_REVERB)
    return Reverb(tmp_path)


@pytest.fixture
def serve_reverb(reverb: Reverb) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a Reverb server; all of them are ended with the test."""
    servers: list[ServerProcess] = []

    def start(*args: Any, **overrides: Any) -> ServerProcess:
        servers.append(reverb.serve(*args, **overrides))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
