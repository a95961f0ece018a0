"""Who computes an actor's decisions: the actor itself, or one server that answers many actors at a time.

Both give the same actions for the same seed: decision n of an actor draws from fold_in(key(seed), n).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from common.types import Array, ArraySpec, Carry, Params, ParamSource, Policy

REFRESH_SECONDS = 0.25  # between two looks for newer parameters


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


def deciding(policy: Policy) -> Callable[..., tuple]:
    """`policy.act` with its key drawn from a seed's key and the number of the decision."""

    def decide(params: Params, carry: Carry, obs: dict, is_first: Array, key: Array, count: Array) -> tuple:
        return policy.act(params, carry, obs, is_first, jax.random.fold_in(key, count))

    return decide


def blank(obs: Mapping[str, ArraySpec], *lead: int) -> dict[str, np.ndarray]:
    """Zeros [*lead, ...] in place of observations."""
    return {name: np.zeros((*lead, *spec.shape), spec.dtype) for name, spec in obs.items()}


class Newest:
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
        if not force and now - self._looked < REFRESH_SECONDS:
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
        self._newest = Newest(source)
        self._obs, self._num_envs = obs, num_envs
        self._carry = policy.init(num_envs)
        self._key, self._count = jax.random.PRNGKey(np.uint32(seed)), jnp.uint32(0)
        decide = deciding(policy)
        # It counts for itself: a number from outside would be one more transfer per decision.
        self._act = jax.jit(lambda *args: (*decide(*args), args[-1] + 1))
        self.version = 0

    def warm_up(self, timeout: float) -> None:
        self._newest.await_first(timeout)
        obs, first = blank(self._obs, self._num_envs), np.ones(self._num_envs, bool)
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
    """The way to a server, see `actors.inference_server`."""

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
