"""The versioned parameter holder between learner and actors."""

from __future__ import annotations

import threading
from typing import Any

from common.types import Params


class Holder:
    """Keeps the newest (version, value). Thread-safe; under Ray it lives in an actor of its own.

    There the value is a list with one object reference, so that the holder never sees the parameters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: tuple[int, Any] | None = None

    def put(self, version: int, value: Any) -> None:
        with self._lock:
            if self._newest is None or version > self._newest[0]:
                self._newest = (version, value)

    def get(self, have: int) -> tuple[int, Any] | None:
        """The newest (version, value) if it is newer than `have`."""
        with self._lock:
            return self._newest if self._newest is not None and self._newest[0] > have else None


class RayHolder:
    """`put`/`get` of a `Holder` in a Ray actor, usable from any process.

    The learner's process owns the parameters in the object store; actors map them without a copy.
    """

    def __init__(self, handle: Any):
        self._handle = handle

    def put(self, version: int, params: Params) -> None:
        import ray

        ray.get(self._handle.put.remote(version, [ray.put(params)]))

    def get(self, have: int) -> tuple[int, Params] | None:
        """None also when holder or learner do not answer: actors go on with what they have."""
        import ray
        from ray.exceptions import RayError

        try:
            newest = ray.get(self._handle.get.remote(have), timeout=5.0)
            return None if newest is None else (newest[0], ray.get(newest[1][0], timeout=30.0))
        except (RayError, TimeoutError):
            return None
