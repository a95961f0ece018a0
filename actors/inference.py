"""Who computes an actor's decisions: the actor itself, or one server that answers many actors at a time.

Both give the same actions for the same seed: decision n of an actor draws from fold_in(key(seed), n).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from common.types import Array, ArraySpec, Carry, Params, ParamSource, Policy

_REFRESH_SECONDS = 0.25  # between two looks for newer parameters


class Inference(Protocol):
    """Decides for the k environments of one actor; remembers what the policy carries."""

    version: int  # of the parameters that decided last; 0 before there are any

    def warm_up(self, timeout: float) -> None:
        """Waits for the first parameters and compiles. Raises TimeoutError."""
        ...

    def act(
        self, obs: Mapping[str, np.ndarray], is_first: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]] | None:
        """(actions [k, A], the policy's statistics); None while nobody answers: ask the same again."""
        ...

    def catch_up(self) -> int:
        """Looks for newer parameters; returns the version that would decide now."""
        ...


def _decide(policy: Policy) -> Callable[..., tuple]:
    """`policy.act` with its key drawn from a seed's key and the number of the decision."""

    def decide(params: Params, carry: Carry, obs: dict, is_first: Array, key: Array, count: Array) -> tuple:
        return policy.act(params, carry, obs, is_first, jax.random.fold_in(key, count))

    return decide


def _blank(obs: Mapping[str, ArraySpec], *lead: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((*lead, *spec.shape), spec.dtype) for name, spec in obs.items()}


class _Newest:
    """The newest parameters, on the device: one transfer per version.

    Numpy parameters would be transferred at every decision.
    """

    def __init__(self, source: ParamSource):
        self._source = source
        self._looked = -float("inf")
        self.version = 0
        self.params: Params | None = None

    def refresh(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._looked < _REFRESH_SECONDS:
            return
        self._looked = now
        newer = self._source.get(self.version)
        if newer is not None:
            self.version, self.params = newer[0], jax.device_put(newer[1])

    def await_first(self, timeout: float, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Raises TimeoutError, also when told to stop."""
        deadline = time.monotonic() + timeout
        self.refresh(force=True)
        while self.params is None:
            if time.monotonic() > deadline or should_stop():
                raise TimeoutError(f"no parameters were published within {timeout:.0f} s")
            time.sleep(0.05)
            self.refresh(force=True)


class LocalInference:
    """An `Inference` in the actor's own process."""

    def __init__(
        self,
        policy: Policy,
        source: ParamSource,
        obs: Mapping[str, ArraySpec],
        num_envs: int,
        seed: int,
    ):
        self._newest = _Newest(source)
        self._obs, self._num_envs = obs, num_envs
        self._carry = policy.init(num_envs)
        self._key, self._count = jax.random.PRNGKey(np.uint32(seed)), jnp.uint32(0)
        decide = _decide(policy)
        # It counts for itself: a number from outside would be one more transfer per decision.
        self._act = jax.jit(lambda *args: (*decide(*args), args[-1] + 1))
        self.version = 0

    def warm_up(self, timeout: float) -> None:
        self._newest.await_first(timeout)
        obs, first = _blank(self._obs, self._num_envs), np.ones(self._num_envs, bool)
        jax.block_until_ready(self._call(obs, first))

    def act(self, obs: Mapping[str, np.ndarray], is_first: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        self.version = self.catch_up()
        self._carry, actions, stats, self._count = self._call(obs, is_first)
        return np.asarray(actions), stats

    def catch_up(self) -> int:
        self._newest.refresh()
        return self._newest.version

    def _call(self, obs: Mapping[str, np.ndarray], is_first: np.ndarray) -> tuple:
        return self._act(self._newest.params, self._carry, obs, is_first, self._key, self._count)


class Request(NamedTuple):
    """One decision for the environments of one actor."""

    actor: int  # its number
    seed: int  # of its present life: another seed, another stream
    count: int  # decisions before this one
    obs: Mapping[str, np.ndarray]  # name -> [k, ...]
    is_first: np.ndarray  # bool [k]


class Answer(NamedTuple):
    actions: np.ndarray  # float32 [k, A]
    stats: dict[str, float]
    version: int  # of the parameters that decided


class InferenceClient(Protocol):
    """The way to a server, see `InferenceServer`."""

    def ask(self, request: Request) -> Answer | None:
        """None when there is no answer yet: the same request may be asked again."""
        ...

    def version(self) -> int | None:
        """Of the server's parameters; None when it does not answer."""
        ...


class RemoteInference:
    """An `Inference` that asks a server."""

    def __init__(self, client: InferenceClient, actor: int, seed: int):
        self._client, self._actor, self._seed = client, actor, seed
        self._count = 0
        self.version = 0

    def warm_up(self, timeout: float) -> None:
        """Nothing: a server that is not ready yet does not answer."""

    def act(
        self, obs: Mapping[str, np.ndarray], is_first: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]] | None:
        answer = self._client.ask(Request(self._actor, self._seed, self._count, obs, is_first))
        if answer is None:
            return None
        self._count += 1
        self.version = answer.version
        return answer.actions, answer.stats

    def catch_up(self) -> int:
        return self._client.version() or self.version


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
        self._newest = _Newest(source)
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
                self._lock.wait(_REFRESH_SECONDS)
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
        obs, is_first = _blank(self._obs, size, self._envs), np.ones((size, self._envs), bool)
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
    decide = jax.vmap(_decide(policy), in_axes=(None, 0, 0, 0, 0, 0))

    def step(
        params: Params, carries: Carry, rows: Array, obs: dict, is_first: Array, seeds: Array, counts: Array
    ) -> tuple:
        keys = jax.vmap(jax.random.PRNGKey)(seeds)
        own = jax.tree.map(lambda x: x[rows], carries)
        own, actions, stats = decide(params, own, obs, is_first, keys, counts)
        return jax.tree.map(lambda x, new: x.at[rows].set(new), carries, own), actions, stats

    return step
