"""The versioned parameter holder between learner and actors."""

from __future__ import annotations

import logging
import threading
from typing import Any

from common.types import Params

logger = logging.getLogger(__name__)

_PUT_SECONDS = 30.0


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

    def version(self) -> int:
        """The newest there is; 0 without any."""
        with self._lock:
            return 0 if self._newest is None else self._newest[0]


class RayHolder:
    """`put`/`get` of a `Holder` in a Ray actor, usable from any process.

    The learner's process owns the parameters in the object store; actors map them without a copy.
    """

    def __init__(self, handle: Any):
        self._handle = handle

    def put(self, version: int, value: Params) -> None:
        """A version that cannot be handed out now is left out: actors go on with what they have."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._handle.put.remote(version, [ray.put(value)]), timeout=_PUT_SECONDS)
        except (RayError, TimeoutError) as error:
            logger.warning("version %d of the parameters was not published: %s", version, error)

    def version(self) -> int:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self._handle.version.remote(), timeout=_PUT_SECONDS)
        except (RayError, TimeoutError):
            return 0  # a holder that was just started anew

    def get(self, have: int) -> tuple[int, Params] | None:
        """None also when holder or learner do not answer: actors go on with what they have."""
        import ray
        from ray.exceptions import RayError

        try:
            newest = ray.get(self._handle.get.remote(have), timeout=5.0)
            return None if newest is None else (newest[0], ray.get(newest[1][0], timeout=30.0))
        except (RayError, TimeoutError):
            return None
