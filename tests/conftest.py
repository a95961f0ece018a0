from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported anywhere, also in child processes
# What one test has compiled, the others (and their processes) need not compile again.
_OWNS_CACHE = "PYTEST_XDIST_WORKER" not in os.environ
if _OWNS_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="safedreamer-jax-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Where Python may not keep bytecode, every process that a test starts would compile all of ours.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Shells start background jobs deaf to Ctrl-C, and what they start inherits it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402 (after the environment is set)
import pytest  # noqa: E402

hypothesis.settings.register_profile("shared machine", deadline=None)  # it would measure the other tests
hypothesis.settings.load_profile("shared machine")


def pytest_unconfigure() -> None:
    if _OWNS_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests of a session; runs use the Ray that is there."""
    import ray

    from deploy.local import start_ray

    start_ray()
    yield
    ray.shutdown()
