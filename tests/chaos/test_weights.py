"""Parameters that cannot be handed out now fail nobody: actors go on with what they have."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deploy.weights import Holder, RayHolder

PARAMS = {"weight": np.arange(6.0)}


@pytest.fixture
def handle(ray_session: None) -> Iterator[Any]:
    import ray

    handle = ray.remote(Holder).options(num_cpus=0, max_restarts=-1).remote()
    yield handle
    ray.kill(handle)


def test_a_full_object_store_leaves_a_version_out(handle, monkeypatch, caplog):
    import ray
    from ray.exceptions import ObjectStoreFullError

    weights = RayHolder(handle)
    weights.put(1, PARAMS)
    with monkeypatch.context() as patch:

        def full(value: Any) -> None:
            raise ObjectStoreFullError("no room")

        patch.setattr(ray, "put", full)
        weights.put(2, PARAMS)
    assert "version 2 of the parameters was not published" in caplog.text
    newest = weights.get(0)
    assert newest is not None
    assert newest[0] == weights.version() == 1
    weights.put(3, PARAMS)
    assert weights.version() == 3


def test_parameters_get_through_while_the_store_is_full_of_something_else(handle):
    import ray

    held = [ray.get(ray.put(np.full(40_000_000, i, np.uint8))) for i in range(7)]  # 280 of 300 MB, in use
    weights = RayHolder(handle)
    for version in (1, 2):
        weights.put(version, {"weight": np.full(10_000_000, float(version))})
    newest = weights.get(0)
    assert newest is not None
    assert newest[0] == 2
    assert (newest[1]["weight"] == 2.0).all()
    assert [part[0] for part in held] == list(range(7))


def test_a_killed_holder_comes_back_with_the_next_version(handle):
    import ray

    weights = RayHolder(handle)
    weights.put(7, PARAMS)
    os.kill(ray.get(handle.__ray_call__.remote(lambda holder: os.getpid())), signal.SIGKILL)
    deadline = time.monotonic() + 60
    version = 8
    while weights.version() != version and time.monotonic() < deadline:
        weights.put(version, PARAMS)
    newest = weights.get(7)
    assert newest is not None
    assert newest[0] == version
    assert (newest[1]["weight"] == PARAMS["weight"]).all()
