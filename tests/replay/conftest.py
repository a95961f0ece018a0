from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.config import ReplayConfig
from common.types import ArraySpec
from replay.process import ServerProcess, spawn_server

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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a replay server in a process of its own; all of them are ended with the test."""
    servers: list[ServerProcess] = []

    def start(cfg: ReplayConfig = CONFIG, **overrides: Any) -> ServerProcess:
        arguments = {
            "batch_length": 8,
            "train_ratio": 16.0,
            "batch_size": 4,
            "min_steps": 20,
            "log": tmp_path / "server.log",
            **overrides,
        }
        server = spawn_server(SIGNATURE, cfg, **arguments)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()
