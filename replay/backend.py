"""The one place that imports Reverb.

Reverb imports all of TensorFlow's Python, although server, client, writer and sampler only need
TensorFlow's shared library. The `lite` mode loads that library and stands small placeholder modules
in for the rest: seconds and hundreds of megabytes less per process. It is tied to the pinned
versions of Reverb and TensorFlow; `full` is the plain import.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from common.types import UserError

Mode = Literal["lite", "full"]
TABLE = "replay"  # name of the only table

_log = logging.getLogger(__name__)
_lock = threading.Lock()

# Reverb modules that do nothing without TensorFlow's Python, and the class each one exports.
_TF_ONLY = {
    "reverb.pattern_dataset": "PatternDataset",
    "reverb.tf_client": "TFClient",
    "reverb.timestep_dataset": "TimestepDataset",
    "reverb.trajectory_dataset": "TrajectoryDataset",
}
# TensorFlow modules that the rest of Reverb imports, and the names it reads while being imported.
_TF_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "tensorflow": (),
    "tensorflow.compat": (),
    "tensorflow.compat.v1": ("Tensor", "TensorSpec"),
    "tensorflow.python": (),
    "tensorflow.python.framework": (),
    "tensorflow.python.framework.tensor_shape": (),
    "tensorflow.python.framework.tensor_spec": ("TensorSpec",),
    "tensorflow.python.saved_model": (),
    "tensorflow.python.saved_model.nested_structure_coder": (),
}


def exists() -> bool:
    """Whether there is a Reverb for this system and Python: Linux x86_64 and CPython 3.8 to 3.11."""
    python = platform.python_implementation() == "CPython" and (3, 8) <= sys.version_info[:2] <= (3, 11)
    return python and (platform.system(), platform.machine()) == ("Linux", "x86_64")


def check_platform() -> None:
    """Raises UserError where no Reverb wheel exists."""
    if not exists():
        here = f"{platform.system()} {platform.machine()}"
        python = f"{platform.python_implementation()} {platform.python_version()}"
        raise UserError(
            "replay.server reverb exists for Linux x86_64 with CPython 3.8 to 3.11; this is "
            f"{here} with {python}. Use --replay.server memory; the replay buffer of a run that was trained "
            "with Reverb is left behind then."
        )


def load(mode: Mode = "lite") -> ModuleType:
    """Returns the reverb module.

    `lite` can not use tf.data datasets, TFClient and table signatures. A process holds one copy of
    Reverb: later calls return the first one, whatever the mode. Raises UserError on a platform
    without Reverb and when Reverb or TensorFlow are not installed.
    """
    check_platform()
    with _lock:
        if "reverb" in sys.modules:
            return sys.modules["reverb"]
        for package, pin in (("reverb", "dm-reverb==0.14.0"), ("tensorflow", "tensorflow-cpu==2.15.1")):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"The package {pin} is not installed; install requirements/classic.lock with --no-deps."
                )
        # Replay lies on this machine or in this cluster: an HTTP proxy would only be in the way.
        os.environ.setdefault("grpc_proxy", "")
        # Reverb asks distutils for version numbers: a deprecation that is none of the user's business.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            if mode == "full" or "tensorflow" in sys.modules:
                os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
                return _import_reverb()
            with _without_tensorflow():
                return _import_reverb()


@cache
def connect(address: str, mode: Mode = "lite") -> Any:
    """The client of this process for the server at `address` ("host:port"); writers and samplers share it.

    Connecting never blocks: a server that is not there yet is found when it comes up.
    """
    return load(mode).Client(address)


def server_answers(address: str, seconds: int = 1) -> bool:
    """Whether the server at `address` answers within `seconds`."""
    try:
        connect(address).server_info(timeout=seconds)
    except Exception:  # Reverb raises several types; all mean that nobody answers
        return False
    return True


def trajectory_writer(client: Any, chunk: int, window: int) -> Any:
    """Reverb's own writer without the Python around it, which costs several times more per step.

    It compresses `chunk` steps together and keeps `window` steps referable: `Append(columns)` returns
    references, `CreateItem(table, priority, [references of a column], [squeeze])` never blocks,
    `Flush(pending, timeout_ms)` blocks until at most `pending` items are unconfirmed.
    """
    options = importlib.import_module("reverb.pybind").ConstantChunkerOptions(chunk, window)
    return client._client.NewTrajectoryWriter(options, False)


def trajectory_sampler(client: Any, in_flight: int) -> Any:
    """Reverb's own sampler: `GetNextTrajectory()` blocks, without an end, and returns columns last."""
    return client._client.NewSampler(TABLE, -1, in_flight)


def _import_reverb() -> ModuleType:
    try:
        return importlib.import_module("reverb")
    except ImportError as error:
        raise UserError(
            f"Reverb can not be imported ({error}); install requirements/classic.lock with --no-deps, which "
            "pins the one TensorFlow that fits, or try --replay.import-mode full."
        ) from error


@contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Placeholders for TensorFlow's Python while Reverb is being imported."""
    spec = importlib.util.find_spec("tensorflow")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    libraries = sorted(root.glob("libtensorflow_framework.so.*"))
    if not libraries:
        raise UserError(f"{root} holds no libtensorflow_framework.so; reinstall tensorflow-cpu==2.15.1.")
    # Symbols stay local: made global, TensorFlow's copy of BoringSSL would replace the one of hashlib.
    ctypes.CDLL(str(libraries[0]))

    placeholders = {name: _placeholder(name, names) for name, names in _TF_PLACEHOLDERS.items()}
    tensorflow: Any = placeholders["tensorflow"]
    tensorflow.__path__ = [str(root)]  # the protocol buffers in tensorflow.core are the real ones
    version = _tensorflow_version()
    tensorflow.__version__ = version
    tensorflow.version = types.SimpleNamespace(VERSION=version)
    placeholders |= {name: _placeholder(name, (exported,)) for name, exported in _TF_ONLY.items()}
    sys.modules.update(placeholders)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n == "tensorflow" or n.startswith("tensorflow.")]:
            del sys.modules[name]  # who imports tensorflow later shall get the real one


def _tensorflow_version() -> str:
    for distribution in ("tensorflow-cpu", "tensorflow"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(
        "tensorflow-cpu==2.15.1 is not installed; install requirements/classic.lock with --no-deps."
    )


def _placeholder(name: str, exported: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    for attribute in exported:
        setattr(module, attribute, _unusable(f"{name}.{attribute}"))
    return module


def _unusable(name: str) -> type:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"{name} needs TensorFlow's Python: load Reverb with mode='full'.")

    return type(name.rpartition(".")[2], (), {"__init__": refuse})
