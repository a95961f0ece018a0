"""Clocks, medians and the machine's yardstick, for all benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Time(NamedTuple):
    """Seconds."""

    cpu: float  # of the whole process, all threads
    wall: float


class Row(NamedTuple):
    """One line of the table."""

    suite: str
    name: str
    value: float
    unit: str
    target: str = ""  # what it should reach
    note: str = ""


def clock(work: Callable[[], Any]) -> Time:
    """Times one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Time(time.process_time() - cpu, time.perf_counter() - wall)


def median(times: Sequence[Time]) -> Time:
    return Time(statistics.median(t.cpu for t in times), statistics.median(t.wall for t in times))


def repeat(work: Callable[[], Any], count: int) -> Time:
    """Median of `count` calls, after one that does not count."""
    work()
    return median([clock(work) for _ in range(count)])


def in_products(work: Callable[[], Any], count: int) -> tuple[float, Time]:
    """Median of `count` calls in products of `matmul`, each timed beside its call: clock rates wander."""
    work()
    pairs = [(matmul(3), clock(work)) for _ in range(count)]
    units = statistics.median(each.cpu / product.cpu for product, each in pairs)
    return units, median([each for _, each in pairs])


def matmul(count: int = 9) -> Time:
    """One float32 product of 1024 x 1024 matrices: 2.15 GFLOP, the yardstick between two machines."""
    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (1024, 1024))
    product = jax.jit(jnp.matmul)
    batch = 10

    def work() -> None:
        for _ in range(batch):
            y = product(x, x)
        jax.block_until_ready(y)

    total = repeat(work, count)
    return Time(total.cpu / batch, total.wall / batch)
