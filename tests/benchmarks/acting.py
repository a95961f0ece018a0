"""An actor process by itself: CPU time per agent step, and where it goes.

Environments, policy and writers are the real ones, the replay server is a child process whose limiter
never holds. Environments are timed by the acting thread, the policy by all threads; the writers get all
the rest, with Reverb's threads. What the policy computes is the time of many decisions compiled into one
call; the difference to its own time is dispatch and transfers.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import jax
import numpy as np
import psutil

from actors.vector_env import SafetyVectorEnv
from common import configuration
from common.config import Config
from common.types import EnvSpec, Policy
from deploy import wiring
from replay import backend
from tests.benchmarks.measure import Row, repeat

TASK = "SafetyPointGoal1-v0"
ROUNDS = 5
DECISIONS = {"bsrp_lag": 200, "osrp_tracked": 20, "osrp_vector": 10}  # per round; planners take longer
OVERHEAD_TARGET = 25  # %
IMPORT_TARGET = 150  # MB
PARTS = ("environment", "policy", "dispatch, transfers", "writer")


def run() -> Iterator[Row]:
    """Per method, then the memory of both ways to import Reverb."""
    for method in DECISIONS:
        parts = _child("split", method)
        whole = sum(parts.values())
        shares = ", ".join(f"{name} {100 * parts[name] / whole:.1f} %" for name in PARTS)
        yield Row("acting", f"{method} agent step", 1e6 * whole, "us CPU", note=shares)
        overhead = 100 * (parts["dispatch, transfers"] + parts["writer"]) / whole
        target = f"< {OVERHEAD_TARGET}"
        yield Row("acting", f"{method} dispatch, transfers, writer", overhead, "%", target)
        for name in PARTS:
            yield Row("acting", f"{method} {name}", 1e6 * parts[name], "us CPU")
    for observation in ("coordinates", "vision"):
        step = _child("environment", observation)["cpu"]
        yield Row("acting", f"{observation} environment", 1e6 * step, "us CPU")
    for mode in ("lite", "full"):
        used = _child("import", mode)
        target = f"< {IMPORT_TARGET}" if mode == "lite" else ""
        yield Row(
            "acting", f"import of Reverb, {mode}", used["memory"], "MB", target, f"{used['cpu']:.1f} s of CPU"
        )


def _child(*words: str) -> dict[str, float]:
    """What this module prints for `words`, in a process set up as an actor's."""
    from deploy.local import _ON_CPU, _ONE_THREAD

    command = [sys.executable, "-m", "tests.benchmarks.acting", *words]
    done = subprocess.run(
        command, env={**os.environ, **_ON_CPU, **_ONE_THREAD}, stdout=subprocess.PIPE, check=True, timeout=600
    )
    return json.loads(done.stdout.splitlines()[-1])


def split(method: str) -> dict[str, float]:
    """CPU-seconds per agent step of one environment, by part."""
    cfg = configuration.load(method=method, size="nano", task=TASK)
    spec = wiring.spec_of(cfg)
    leaves = _parameters(cfg, spec)
    envs = cfg.actors.envs
    with replay_for(cfg) as (writers, _, _):
        rollout = wiring.rollout(cfg, spec, _Source(leaves), writers, actor=0, life=0, prefill=0)
        rollout.warm_up(60.0)
        environment = _timed(rollout._env, "step", time.thread_time)
        policy = _timed(rollout, "_choose", time.process_time)
        rounds = []
        for _ in range(ROUNDS + 1):
            environment.clear()
            policy.clear()
            started, calls = time.process_time(), itertools.count()
            rollout.run(1e9, 10**9, lambda calls=calls: next(calls) >= DECISIONS[method])
            rounds.append((time.process_time() - started, sum(environment), sum(policy)))
        rollout.close()
    count = DECISIONS[method] * envs
    whole, stepping, choosing = (median(part) / count for part in zip(*rounds[1:], strict=True))
    computing = _computing(wiring.published_policy(cfg, spec, explore=True), spec, leaves, envs)
    return dict(
        zip(PARTS, (stepping, computing, choosing - computing, whole - stepping - choosing), strict=True)
    )


def _parameters(cfg: Config, spec: EnvSpec) -> list[np.ndarray]:
    train = wiring.train_step(cfg, spec)
    return jax.device_get(jax.tree.leaves(train.acting(train.start())))


class _Source:
    def __init__(self, params: Any):
        self._params = params

    def get(self, have: int) -> tuple[int, Any] | None:
        return None if have else (1, self._params)


def _timed(target: Any, name: str, clock: Callable[[], float]) -> list[float]:
    """Seconds of every call of a method from now on."""
    method, seconds = getattr(target, name), []

    def call(*args: Any) -> Any:
        started = clock()
        try:
            return method(*args)
        finally:
            seconds.append(clock() - started)

    setattr(target, name, call)
    return seconds


def _computing(policy: Policy, spec: EnvSpec, leaves: list[np.ndarray], envs: int, count: int = 20) -> float:
    """CPU-seconds per environment of a decision that nobody dispatches: `count` of them in one call."""
    rng = np.random.default_rng(0)
    obs = {
        name: rng.normal(size=(envs, *array.shape)).astype(array.dtype) for name, array in spec.obs.items()
    }

    @jax.jit
    def decisions(params: Any, carry: Any, obs: Any, keys: Any) -> tuple:
        first = np.zeros(envs, bool)

        def decide(carry: Any, key: Any) -> tuple:
            carry, actions, _ = policy.act(params, carry, obs, first, key)
            return carry, actions

        return jax.lax.scan(decide, carry, keys)

    arguments = jax.device_put(
        (leaves, policy.init(envs), obs, jax.random.split(jax.random.PRNGKey(0), count))
    )
    return repeat(lambda: jax.block_until_ready(decisions(*arguments)), ROUNDS).cpu / (count * envs)


def environment(observation: str) -> dict[str, float]:
    """CPU-seconds per agent step of environments that are not followed by anything else."""
    cfg = configuration.load(method="bsrp_lag", size="nano", task=TASK, observation=observation)
    env = SafetyVectorEnv(TASK, observation, cfg.env.action_repeat, cfg.actors.envs, 0)
    actions = np.random.default_rng(0).uniform(-1, 1, (env.num_envs, env.spec.action_size))
    each = repeat(lambda: env.step(actions.astype(np.float32)), 60)
    env.close()
    return {"cpu": each.cpu / env.num_envs}


def _import(mode: backend.Mode) -> dict[str, float]:
    process, cpu = psutil.Process(), time.process_time()
    before = process.memory_info().rss
    backend.load(mode)
    return {"memory": (process.memory_info().rss - before) / 1e6, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    measure: dict[str, Callable[[Any], dict[str, float]]]
    measure = {"split": split, "environment": environment, "import": _import}
    print(json.dumps(measure[sys.argv[1]](sys.argv[2])))
