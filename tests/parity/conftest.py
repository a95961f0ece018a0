from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.parity.recorded import System, system


@pytest.fixture(autouse=True, scope="package")
def quick_compilation() -> Iterator[None]:
    """These tests compile much and compute next to nothing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="package")
def vector() -> System:
    """OSRP-Vector: coordinates, geometric cost, the planner acts."""
    return system("osrp_vector")


@pytest.fixture(scope="package")
def pid() -> System:
    """OSRP-Lag: two cameras, learned cost, the planner acts under a PID penalty."""
    return system("osrp_lag")


@pytest.fixture(scope="package")
def augmented() -> System:
    """BSRP-Lag: two cameras, learned cost, the actor acts under an augmented Lagrangian."""
    return system("bsrp_lag")
