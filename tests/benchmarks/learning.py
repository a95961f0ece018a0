"""The training step and the planner at the published figures, in products of 1024 x 1024 matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from common import configuration, memory
from common.config import Config
from common.types import Batch, EnvSpec, replay_spec
from deploy import wiring
from learner.learner import Learner
from tests.benchmarks.measure import Row, Time, in_products, matmul, repeat
from tests.benchmarks.scaling import count

# The published implementation on its own, in CPU-seconds over the CPU-seconds of one product.
PUBLISHED_STEP = 170
PUBLISHED_DECISION = 120
PRODUCT_FLOPS = 2 * 1024**3
ENVIRONMENTS = (1, 2, 4, 8, 16)


def _config(size: str, method: str = "osrp_vector") -> tuple[Config, EnvSpec]:
    cfg = configuration.load(method=method, size=size, task="SafetyPointGoal1-v0")
    return cfg, wiring.spec_of(cfg)


def _batch(cfg: Config, spec: EnvSpec) -> Batch:
    rng = np.random.default_rng(0)
    shape = (cfg.learner.batch_size, cfg.learner.batch_length)
    batch = {
        name: rng.normal(size=(*shape, *field.shape)).astype(field.dtype)
        if field.dtype == "float32"
        else np.zeros((*shape, *field.shape), field.dtype)
        for name, field in replay_spec(spec).items()
    }
    batch["is_first"][:, 0] = True
    return batch


def training() -> Iterator[Row]:
    """CPU time of a step; time of the first call."""
    memory.keep_freed()  # as the learner's process does
    product = matmul()
    yield Row(
        "training", "matmul 1024^3", 1e3 * product.cpu, "ms CPU", note=f"{1e3 * product.wall:.1f} ms wall"
    )
    for size, updates in (("paper", 5), ("nano", 50)):
        cfg, spec = _config(size)
        batch = _batch(cfg, spec)
        learner = Learner(wiring.train_step(cfg, spec), lambda _, batch=batch: batch, lambda *_: None, Path())
        started = time.monotonic()
        learner.compile()
        first = time.monotonic() - started
        each = _per_update(learner, updates)
        units = each.cpu / product.cpu
        target, note = "", f"{1e3 * each.cpu:.0f} ms of CPU, {1e3 * each.wall:.0f} ms wall"
        if size == "paper":
            target = f"<= {0.6 * PUBLISHED_STEP:.0f}"
            products = count(learner._train.step, learner._state, batch).flops / PRODUCT_FLOPS  # pyright: ignore
            note += f"; {units / PUBLISHED_STEP:.2f} of the published step; {products:.0f} are products"
        yield Row("training", f"osrp_vector {size} step", units, "matmuls", target, note)
        yield Row("training", f"osrp_vector {size} compile", first, "s", "<= 25" if size == "paper" else "")


def _per_update(learner: Learner, count: int) -> Time:
    def work() -> None:
        for _ in range(count):
            learner._update(learner._source(0.0))  # pyright: ignore
        jax.block_until_ready(learner._state)

    whole = repeat(work, 3)
    return Time(whole.cpu / count, whole.wall / count)


def planning() -> Iterator[Row]:
    """CPU time of a decision at the published settings, and how it grows with environments at nano size."""
    cfg, spec = _config("paper")
    decide, compiled, products = _decision(cfg, spec, 1)
    units, each = in_products(decide, 9)
    note = f"{1e3 * each.cpu:.0f} ms of CPU, {1e3 * each.wall:.0f} ms wall; "
    note += f"{units / PUBLISHED_DECISION:.2f} of the published decision; {products:.0f} are products"
    target = f"<= {0.65 * PUBLISHED_DECISION:.0f}"
    yield Row("planning", "osrp_vector paper decision", units, "matmuls", target, note)
    yield Row("planning", "osrp_vector paper compile", compiled, "s", "<= 15")
    one = None
    for environments in ENVIRONMENTS:
        decide, *_ = _decision(*_config("nano"), environments)
        each = repeat(decide, 20)
        one = one or each
        note = f"{1e3 * each.cpu:.1f} ms of CPU, {1e3 * each.wall:.1f} ms wall"
        target = f"<= {environments}"
        yield Row("planning", f"nano, {environments} environments", each.cpu / one.cpu, "x one", target, note)


def _decision(cfg: Config, spec: EnvSpec, environments: int) -> tuple[Callable[[], None], float, float]:
    """One decision for all environments, seconds of its compilation, its matrix products in units."""
    train = wiring.train_step(cfg, spec)
    params = train.acting(train.start())
    policy = wiring.policy(cfg, spec, explore=True)
    rng = np.random.default_rng(0)
    obs = {
        name: rng.normal(size=(environments, *field.shape)).astype(field.dtype)
        for name, field in spec.obs.items()
    }
    first, key = np.zeros(environments, bool), jax.random.PRNGKey(0)
    carry = policy.init(environments)
    arguments = (params, carry, obs, first, key)
    started = time.monotonic()
    act = jax.jit(policy.act).lower(*arguments).compile()
    seconds = time.monotonic() - started

    def decide() -> None:
        jax.block_until_ready(act(*arguments))

    return decide, seconds, count(policy.act, *arguments).flops / PRODUCT_FLOPS
