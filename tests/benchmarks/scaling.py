"""How many actors feed one GPU learner: from measured costs of the parts, see docs/scaling.md.

    python -m tests.benchmarks acting sampling --out runs/bench.json
    python -m tests.benchmarks.scaling runs/bench.json

Operations are counted in the traced program, where a scan's length is known: XLA's cost_analysis counts the
body of a loop once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from common import configuration
from common.config import Config
from common.types import EnvSpec, replay_spec
from deploy import wiring

# Assumed, not measured: a GPU of the size of an A100. Small float32 products reach a fifth of its peak of
# TF32; every product of a recurrent model brings two more kernels, each of which takes 5 us to start and end.
GPU_FLOPS = 30e12
KERNEL_SECONDS = 5e-6
KERNELS_PER_PRODUCT = 3
NETWORK = 1.25e9  # bytes/s: 10 Gbit/s between the machines
CORES = 16  # of a machine with actors; those of one machine share one copy of the parameters

METHODS = ("bsrp_lag", "osrp_lag", "osrp_vector", "osrp_tracked")


class Work(NamedTuple):
    """Arithmetic of a program."""

    flops: float
    products: float  # matrix products and convolutions, one after another

    def __add__(self, other: Any) -> Work:
        return Work(self.flops + other.flops, self.products + other.products)

    def times(self, count: int) -> Work:
        return Work(count * self.flops, count * self.products)


class Load(NamedTuple):
    """One method on one observation at one size."""

    update: float  # s on the GPU
    wanted: float  # agent steps/s that the learner can replay at its train ratio
    supplied: float  # agent steps/s of one actor process on one core
    inference: float  # share of the actor's time that is the policy's
    server: float  # cores of the replay server
    sampler: float  # cores of the sampler's thread, which has one
    network: float  # bytes/s out of replay
    broadcast: float  # bytes/s to every machine with actors

    @property
    def actors(self) -> int:
        return math.ceil(self.wanted / self.supplied)


def count(function: Callable[..., Any], *arguments: Any) -> Work:
    """The work of a call; arguments may be shapes."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> Work:
    total = Work(0.0, 0.0)
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, equation.params.get("length", 1)
        if name in ("dot_general", "conv_general_dilated"):
            total += Work(2.0 * equation.outvars[0].aval.size * _summed(equation), 1.0)
        for inner in _inner(equation.params.values()):
            total += _count(inner).times(times if name == "scan" else 1)
    return total


def _summed(equation: Any) -> float:
    """Products that make up one element of the result."""
    left, right = (variable.aval for variable in equation.invars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return float(np.prod([left.shape[axis] for axis in contracted]))
    out = equation.params["dimension_numbers"].rhs_spec[0]
    return right.size / right.shape[out]


def _inner(values: Any) -> Iterator[Any]:
    for value in values:
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner


def predict(cfg: Config, measured: dict[str, float], rate: float) -> Load:
    """`rate`: FLOP/s of a policy on one core."""
    spec = wiring.spec_of(cfg)
    train = wiring.train_step(cfg, spec)
    state = jax.eval_shape(train.init, 0)
    batch = _batch(cfg, spec)
    step = count(train.step, state, batch)
    update = max(step.flops / GPU_FLOPS, KERNELS_PER_PRODUCT * step.products * KERNEL_SECONDS)
    learner = cfg.learner
    replayed = learner.batch_size * learner.batch_length
    params = jax.eval_shape(train.acting, state)
    policy = wiring.policy(cfg, spec, explore=True)
    decision = count(policy.act, params, policy.init(1), *_observed(spec)).flops / rate
    observation = "vision" if "vision" in cfg.env.observation else "coordinates"
    us = 1e-6
    overhead = us * (measured["bsrp_lag dispatch, transfers"] + measured["bsrp_lag writer"])
    each = us * measured[f"{observation} environment"] + overhead + decision
    size = sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in replay_spec(spec).values()
    )
    cost = f"{cfg.size} {observation} batch"
    return Load(
        update=update,
        wanted=replayed / learner.train_ratio / update,
        supplied=1 / each,
        inference=decision / each,
        server=1e-3 * measured[f"{cost}, server's side"] / update,
        sampler=1e-3 * measured[f"{cost}, learner's side"] / update,
        network=replayed * size / update,
        broadcast=sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        / (update * learner.publish_every),
    )


def _batch(cfg: Config, spec: EnvSpec) -> dict[str, Any]:
    lead = (cfg.learner.batch_size, cfg.learner.batch_length)
    return {
        name: jax.ShapeDtypeStruct((*lead, *array.shape), array.dtype)
        for name, array in replay_spec(spec).items()
    }


def _observed(spec: EnvSpec) -> tuple[dict[str, Any], Any, Any]:
    obs = {name: jax.ShapeDtypeStruct((1, *array.shape), array.dtype) for name, array in spec.obs.items()}
    return obs, np.ones(1, bool), jax.random.PRNGKey(0)


def shared(load: Load) -> str:
    """The busiest of what all actors share, with as many of them as the learner needs."""
    machines = math.ceil(load.actors / CORES)
    use = {
        "sampler": load.sampler,
        "replay server": load.server / CORES,
        "replay's network": load.network / NETWORK,
        "broadcast": machines * load.broadcast / NETWORK,
    }
    name = max(use, key=lambda part: use[part])
    return f"{name} ({100 * use[name]:.2g} %)"


def _flops_rate(measured: dict[str, float]) -> float:
    """FLOP/s on one core, of the decision whose time was measured."""
    cfg = configuration.load(method="osrp_tracked", size="nano", task="SafetyPointGoal1-v0")
    spec = wiring.spec_of(cfg)
    train = wiring.train_step(cfg, spec)
    params = jax.eval_shape(lambda: train.acting(train.init(0)))
    policy = wiring.policy(cfg, spec, explore=True)
    work = count(policy.act, params, policy.init(1), *_observed(spec))
    return work.flops / (1e-6 * measured["osrp_tracked policy"])


def main() -> None:
    """Entry point: prints a Markdown table."""
    rows = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["rows"]]
    measured = {row["name"]: row["value"] for row in rows}
    rate = _flops_rate(measured)
    print(f"One core: {rate / 1e9:.1f} GFLOP/s in a policy.\n")
    head = (
        "size, method, observation",
        "ms per update",
        "agent steps/s wanted",
        "per actor",
        "actors",
        "replay server, cores",
        "sampler, cores",
        "replay, MB/s",
        "broadcast, MB/s",
        "an actor's time goes to",
        "busiest shared part",
    )
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for size in ("nano", "paper"):
        for method in METHODS:
            for observation in ("coordinates", "vision"):
                if observation == "vision" and method in ("osrp_vector", "osrp_tracked"):
                    continue
                cfg = configuration.load(
                    method=method, size=size, task="SafetyPointGoal1-v0", observation=observation
                )
                load = predict(cfg, measured, rate)
                values = (
                    f"{size} {method} {observation}",
                    f"{1e3 * load.update:.1f}",
                    f"{load.wanted:.0f}",
                    f"{load.supplied:.3g}",
                    f"{load.actors}",
                    f"{load.server:.2f}",
                    f"{load.sampler:.2f}",
                    f"{load.network / 1e6:.3g}",
                    f"{load.broadcast / 1e6:.3g}",
                    f"inference ({100 * load.inference:.0f} %)"
                    if load.inference > 0.5
                    else f"environment ({100 * (1 - load.inference):.0f} %)",
                    shared(load),
                )
                print("| " + " | ".join(values) + " |", flush=True)


if __name__ == "__main__":
    main()
