"""One server that decides for many actors at a time; see `actors.inference` for what they ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from actors.inference import REFRESH_SECONDS, Answer, Newest, Request, blank, deciding
from common.types import Array, ArraySpec, Carry, Params, ParamSource, Policy


@dataclass
class InferenceReport:
    """What a server has done since the last report."""

    version: int = 0
    requests: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class _Pending(NamedTuple):
    request: Request
    arrived: float
    answer: Future[Answer]


class InferenceServer:
    """Answers the requests of all actors in batches; thread-safe.

    A batch is closed when it holds `max_batch` environments or a request of every actor, at the latest
    `max_wait_ms` after its first request. Carries stay here, one row per actor. A row serves one unbroken
    series of decisions: where another begins (a new life of the actor, or of this server), its environments
    act as at an episode's start.

    Args:
        actors: how many there are.
        envs: environments of each.
    """

    def __init__(
        self,
        policy: Policy,
        source: ParamSource,
        obs: Mapping[str, ArraySpec],
        *,
        actors: int,
        envs: int,
        max_batch: int,
        max_wait_ms: float,
    ):
        self._policy, self._obs, self._actors, self._envs = policy, obs, actors, envs
        self._sizes = _sizes(min(actors, max(1, max_batch // envs)))
        self._wait_seconds = max_wait_ms / 1000
        self._newest = Newest(source)
        self._step = jax.jit(_batched(policy), donate_argnums=1)
        self._forget()
        self._lock = threading.Condition()
        self._pending: dict[int, _Pending] = {}  # by actor, in the order of arrival
        self._closed = False
        self._ready: Future[None] = Future()
        self._done: list[float] = []  # seconds from arrival to answer, since the last report
        self._batches, self._busy, self._reported = 0, 0.0, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self, timeout: float) -> None:
        """Waits for the first parameters and compiles. Call it once. Raises what goes wrong there."""
        self._timeout = timeout
        self._thread.start()
        self._ready.result()

    def act(self, request: Request) -> Answer:
        """Blocks until this request is decided, with those of other actors."""
        pending = _Pending(request, time.monotonic(), Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the inference server is closed")
            left = self._pending.pop(request.actor, None)  # by an earlier life of the actor
            self._pending[request.actor] = pending
            self._lock.notify()
        if left is not None:
            left.answer.cancel()
        return pending.answer.result()

    def version(self) -> int:
        """Of the parameters that decide now; 0 before any can."""
        return self._newest.version if self._ready.done() else 0

    def report(self) -> InferenceReport:
        """What happened since the last report."""
        now = time.monotonic()
        with self._lock:
            done, self._done = self._done, []
            batches, self._batches = self._batches, 0
            busy, self._busy = self._busy, 0.0
            elapsed, self._reported = now - self._reported, now
        metrics = {}
        if done:
            metrics = {
                "inference/batch": len(done) * self._envs / batches,
                "inference/latency_ms": 1000 * sum(done) / len(done),
                "inference/busy": busy / max(elapsed, 1e-9),
            }
        return InferenceReport(self.version(), len(done), metrics)

    def close(self) -> None:
        """Whoever waits for an answer hears that there will be none. May be called again."""
        with self._lock:
            self._closed = True
            left, self._pending = self._pending, {}
            self._lock.notify()
        for pending in left.values():
            pending.answer.set_exception(RuntimeError("the inference server is closed"))
        if self._ready.done() and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._newest.await_first(self._timeout, lambda: self._closed)
            for size in self._sizes:
                self._decide([], size)
        except BaseException as error:
            return self._ready.set_exception(error)
        self._ready.set_result(None)
        while not self._closed:
            self._newest.refresh()
            batch = self._collect()
            if batch:
                self._answer(batch)

    def _collect(self) -> list[_Pending]:
        with self._lock:
            if not self._pending:
                self._lock.wait(REFRESH_SECONDS)
            if not self._pending:
                return []
            deadline = next(iter(self._pending.values())).arrived + self._wait_seconds
            while len(self._pending) < self._sizes[0] and not self._closed:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._lock.wait(remaining)
            actors = list(self._pending)[: self._sizes[0]]
            return [self._pending.pop(actor) for actor in actors]

    def _answer(self, batch: list[_Pending]) -> None:
        started, version = time.monotonic(), self._newest.version
        size = min(size for size in self._sizes if size >= len(batch))
        try:
            actions, stats = self._decide([pending.request for pending in batch], size)
        except Exception as error:
            self._forget()  # what was donated is gone
            for pending in batch:
                pending.answer.set_exception(error)
            return
        now = time.monotonic()
        with self._lock:
            self._batches += 1
            self._busy += now - started
            self._done += [now - pending.arrived for pending in batch]
        for i, (request, _, answer) in enumerate(batch):
            self._next[request.actor] = (request.seed, request.count + 1)
            own = {name: float(x[i]) for name, x in stats.items()}
            answer.set_result(Answer(actions[i], own, version))

    def _decide(self, requests: list[Request], size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(actions [size, k, A], statistics [size]), padded with decisions that nobody asked for."""
        obs, is_first = blank(self._obs, size, self._envs), np.ones((size, self._envs), bool)
        rows = np.full(size, self._actors, np.int32)  # a row of its own for the padding
        seeds, counts = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
        for i, request in enumerate(requests):
            for name, value in request.obs.items():
                obs[name][i] = value
            rows[i], seeds[i], counts[i] = request.actor, request.seed, request.count
            if self._next.get(request.actor) == (request.seed, request.count):
                is_first[i] = request.is_first
        self._carries, actions, stats = self._step(
            self._newest.params, self._carries, rows, obs, is_first, seeds, counts
        )
        return jax.device_get((actions, stats))

    def _forget(self) -> None:
        """Begins with empty carries [actors + 1, k, ...] and no series of decisions to go on with."""
        count = self._actors + 1
        self._carries = jax.tree.map(lambda x: jnp.stack([x] * count), self._policy.init(self._envs))
        self._next: dict[int, tuple[int, int]] = {}  # by actor: (seed, count) of the decision to come


def _sizes(largest: int) -> list[int]:
    """Numbers of requests that batches are padded to, the largest first: few programs serve all."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _batched(policy: Policy) -> Callable[..., tuple]:
    """(carries, actions [n, k, A], stats [n]) of n requests, whose carries lie in `rows` of all."""
    decide = jax.vmap(deciding(policy), in_axes=(None, 0, 0, 0, 0, 0))

    def step(
        params: Params, carries: Carry, rows: Array, obs: dict, is_first: Array, seeds: Array, counts: Array
    ) -> tuple:
        keys = jax.vmap(jax.random.PRNGKey)(seeds)
        own = jax.tree.map(lambda x: x[rows], carries)
        own, actions, stats = decide(params, own, obs, is_first, keys, counts)
        return jax.tree.map(lambda x, new: x.at[rows].set(new), carries, own), actions, stats

    return step
