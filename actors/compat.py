"""Imports safety-gymnasium 1.0.0 on Python 3.11, silently and untouched otherwise."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import mujoco as _mujoco
import numpy as np

mujoco: Any = _mujoco  # compiled, without type information


def safety_gymnasium() -> ModuleType:
    """The `safety_gymnasium` module, imported on the first call (about one second)."""
    loaded = sys.modules.get("safety_gymnasium")
    if loaded is not None:
        return loaded
    _silence_notices()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Everything that safety-gymnasium builds on is imported first, so that only its own
        # dataclasses see the replaced decorator.
        import gymnasium_robotics  # noqa: F401

        original = dataclasses.dataclass
        dataclasses.dataclass = _array_tolerant(original)
        try:
            import safety_gymnasium as module
        finally:
            dataclasses.dataclass = original
    return module


def _silence_notices() -> None:
    """Takes back the greetings that pygame and gymnasium-robotics print on import."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    from farama_notifications import notifications

    notifications.pop("gymnasium_robotics", None)


def _array_tolerant(original: Any) -> Any:
    """A `dataclass` decorator that takes numpy arrays as defaults.

    Python 3.11 refuses unhashable defaults; safety-gymnasium 1.0.0 gives colours as arrays. Every
    instance gets its own copy.
    """

    def dataclass(cls: type | None = None, /, **options: Any) -> Any:
        def wrap(cls: type) -> type:
            for name in inspect.get_annotations(cls):
                default = cls.__dict__.get(name)
                if isinstance(default, np.ndarray):
                    setattr(cls, name, dataclasses.field(default_factory=default.copy))
            return original(cls, **options)

        return wrap if cls is None else wrap(cls)

    return dataclass
