"""One server for 16 actors against 16 actors that decide for themselves: a nano planner, on the CPU.

Both in this process and without a transport between them: what batching alone gains. A call between two
processes under Ray, which a server costs in addition, is measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from actors.inference import Answer, LocalInference, RemoteInference, Request
from actors.inference_server import InferenceServer
from common import configuration
from common.configuration import merge
from deploy import wiring
from tests.benchmarks.measure import Row, Time, repeat

METHODS = ("osrp_vector", "osrp_tracked", "bsrp_lag")
ACTORS = 16
DECISIONS = 10  # of every actor, per round
ROUNDS = 5


def run() -> Iterator[Row]:
    for method in METHODS:
        alone, together, batch = _compare(method)
        each = ACTORS * DECISIONS
        yield Row("inference", f"{method}, decided by 16 actors", 1e6 * alone.cpu / each, "us CPU")
        note = f"{batch:.1f} environments per batch; wall {1e6 * together.wall / each:.0f} us"
        yield Row(
            "inference", f"{method}, decided by a server", 1e6 * together.cpu / each, "us CPU", "", note
        )
        yield Row("inference", f"{method}, gain of batching", alone.cpu / together.cpu, "x")
    yield _call()


class _Source:
    def __init__(self, params: Any):
        self._params = params

    def get(self, have: int) -> tuple[int, Any] | None:
        return None if have else (1, self._params)


class _Client:
    def __init__(self, server: InferenceServer):
        self._server = server

    def ask(self, request: Request) -> Answer:
        return self._server.act(request)

    def version(self) -> int:
        return self._server.version()


def _compare(method: str) -> tuple[Time, Time, float]:
    """Times of a round by the actors themselves and by a server, and its mean batch."""
    cfg = configuration.load(method=method, size="nano", task="SafetyPointGoal1-v0")
    cfg = merge(
        cfg, {"actors": {"count": ACTORS, "envs": 1}, "inference": {"max_batch": ACTORS}}, "benchmark"
    )
    spec = wiring.spec_of(cfg)
    train = wiring.train_step(cfg, spec)
    source = _Source(jax.device_get(jax.tree.leaves(train.acting(train.start()))))
    rng = np.random.default_rng(0)
    obs = {name: rng.normal(size=(1, *x.shape)).astype(x.dtype) for name, x in spec.obs.items()}
    first = np.zeros(1, bool)
    policy = wiring.published_policy(cfg, spec, explore=True)
    # One program for all: in processes of their own they would share it through the compilation cache.
    own = [LocalInference(policy, source, spec.obs, 1, seed) for seed in range(ACTORS)]
    for inference in own:
        inference._act = own[0]._act
        inference.warm_up(600.0)

    def alone() -> None:
        for _ in range(DECISIONS):
            for inference in own:
                inference.act(obs, first)

    alone_time = repeat(alone, ROUNDS)
    server = wiring.inference_server(cfg, spec, source)
    server.start(600.0)
    asking = [RemoteInference(_Client(server), actor, actor) for actor in range(ACTORS)]

    def decide(inference: RemoteInference) -> None:
        for _ in range(DECISIONS):
            inference.act(obs, first)

    with ThreadPoolExecutor(ACTORS) as pool:
        together = repeat(lambda: list(pool.map(decide, asking)), ROUNDS)
    batch = server.report().metrics["inference/batch"]
    server.close()
    return alone_time, together, batch


def _call() -> Row:
    import ray

    from deploy.local import start_ray

    start_ray()

    @ray.remote(num_cpus=0)
    class Echo:
        def act(self, request: Request) -> Answer:
            return Answer(np.zeros((8, 2), np.float32), {}, 1)

    echo: Any = Echo.remote()
    request = Request(0, 0, 0, {"vector": np.zeros((8, 60), np.float32)}, np.zeros(8, bool))
    calls = 100
    each = repeat(lambda: [ray.get(echo.act.remote(request)) for _ in range(calls)], 5).wall / calls
    ray.shutdown()
    return Row("inference", "call between two processes under Ray", 1e6 * each, "us wall")
