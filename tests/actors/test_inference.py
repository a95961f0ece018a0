"""What a server decides against what the actor itself would have decided."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actors.inference import Answer, LocalInference, RemoteInference, Request
from actors.inference_server import InferenceServer
from common.types import ArraySpec, Policy

OBS = {"vector": ArraySpec((2,))}
SEEDS = [3, 2**32 - 1, 70_000]  # of three actors
ENVS = 2


def _act(params: Any, carry: Any, obs: dict, is_first: Any, key: Any) -> tuple:
    """Its actions depend on everything there is: parameters, decisions since the start, observation, key."""
    carry = jnp.where(is_first, 0, carry + 1)
    noise = jax.random.uniform(key, (len(is_first), 1))
    actions = params + carry[:, None] + obs["vector"].sum(1, keepdims=True) + noise
    return carry, actions, {"carry": carry.sum()}


POLICY = Policy(lambda k: jnp.zeros(k, jnp.int32), _act)


class Source:
    def __init__(self) -> None:
        self.newest: tuple[int, float] | None = (1, 0.0)

    def get(self, have: int) -> tuple[int, Any] | None:
        if self.newest is None or self.newest[0] <= have:
            return None
        return self.newest[0], np.float32(self.newest[1])


class Client:
    """Straight to a server, which may be replaced."""

    def __init__(self, server: InferenceServer):
        self.server = server

    def ask(self, request: Request) -> Answer:
        return self.server.act(request)

    def version(self) -> int:
        return self.server.version()


def start(source: Any = None, policy: Policy = POLICY, **options: Any) -> InferenceServer:
    arguments = {"actors": len(SEEDS), "envs": ENVS, "max_batch": 64, "max_wait_ms": 20.0} | options
    server = InferenceServer(policy, source or Source(), OBS, **arguments)
    server.start(30.0)
    return server


def stream(actor: int, length: int = 12) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Observations [k, 2] and first flags [k] of an actor; its environments restart at different steps."""
    rng = np.random.default_rng(actor)
    obs = rng.normal(size=(length, ENVS, 2)).astype(np.float32)
    first = np.arange(length)[:, None] % np.array([4, 5]) == 0
    return [({"vector": x}, f) for x, f in zip(obs, first, strict=True)]


def local(actor: int, seed: int, steps: list) -> list[np.ndarray]:
    inference = LocalInference(POLICY, Source(), OBS, ENVS, seed)
    return [inference.act(*step)[0] for step in steps]


def played(inference: RemoteInference, steps: list) -> list[np.ndarray]:
    actions = []
    for step in steps:
        choice = inference.act(*step)
        assert choice is not None
        actions.append(choice[0])
    return actions


def test_many_actors_get_the_actions_that_each_would_have_computed():
    server = start()
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        remote = [
            pool.submit(played, RemoteInference(Client(server), i, seed), stream(i))
            for i, seed in enumerate(SEEDS)
        ]
        for i, seed in enumerate(SEEDS):
            np.testing.assert_allclose(remote[i].result(), local(i, seed, stream(i)), rtol=1e-6)
    report = server.report()
    server.close()
    assert report.requests == 36
    assert report.metrics["inference/batch"] > ENVS  # some were decided together
    assert 0 < report.metrics["inference/busy"] <= 1


def test_requests_are_batched_up_to_the_greatest_size_and_the_longest_wait():
    server = start(max_batch=2 * ENVS, max_wait_ms=300.0)
    began = time.monotonic()
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        for i, seed in enumerate(SEEDS):
            pool.submit(played, RemoteInference(Client(server), i, seed), stream(i, 1))
    seconds = time.monotonic() - began
    report = server.report()
    server.close()
    assert report.metrics["inference/batch"] == 1.5 * ENVS  # two at once, then one that waited in vain
    assert 0.3 <= seconds < 5


def test_a_new_life_of_an_actor_begins_as_at_an_episodes_start():
    server = start()
    played(RemoteInference(Client(server), 0, 1), stream(0, 3))
    second = RemoteInference(Client(server), 0, 2)
    later = [(obs, np.zeros(ENVS, bool)) for obs, _ in stream(0, 3)]
    forced = [(later[0][0], np.ones(ENVS, bool)), *later[1:]]
    np.testing.assert_allclose(played(second, later), local(0, 2, forced), rtol=1e-6)
    server.close()


def test_a_new_server_goes_on_as_at_an_episodes_start():
    client = Client(start())
    inference = RemoteInference(client, 1, 5)
    steps = [(obs, np.full(ENVS, t == 0)) for t, (obs, _) in enumerate(stream(1, 6))]
    played(inference, steps[:3])
    client.server.close()
    client.server = start()
    forced = [(obs, np.full(ENVS, t in (0, 3))) for t, (obs, _) in enumerate(steps)]
    np.testing.assert_allclose(played(inference, steps[3:]), local(1, 5, forced)[3:], rtol=1e-6)
    client.server.close()


def test_actors_do_not_share_what_the_policy_carries():
    server = start()
    one, two = (RemoteInference(Client(server), i, 0) for i in (0, 1))
    steps = [(obs, np.full(ENVS, t == 0)) for t, (obs, _) in enumerate(stream(0, 4))]
    first = played(one, steps[:2]) + played(two, steps[:1]) + played(one, steps[2:])
    np.testing.assert_allclose(first[:2] + first[3:], local(0, 0, steps), rtol=1e-6)
    server.close()


def test_newer_parameters_decide_as_soon_as_they_are_seen(monkeypatch):
    monkeypatch.setattr("actors.inference.REFRESH_SECONDS", 0.01)
    source = Source()
    server = start(source)
    inference = RemoteInference(Client(server), 0, 0)
    (before,) = played(inference, stream(0, 1))
    assert inference.version == 1
    source.newest = (7, 100.0)
    deadline = time.monotonic() + 10
    while inference.catch_up() != 7:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (after,) = played(inference, stream(0, 1))
    server.close()
    assert inference.version == 7
    assert (after > before + 90).all()


def test_no_parameters_is_an_error_in_time():
    source = Source()
    source.newest = None
    server = InferenceServer(POLICY, source, OBS, actors=1, envs=1, max_batch=1, max_wait_ms=0)
    with pytest.raises(TimeoutError, match="no parameters"):
        server.start(0.1)
    assert server.version() == 0


def test_what_goes_wrong_reaches_everybody_in_the_batch_and_the_next_one_is_decided():
    def act(params: Any, carry: Any, obs: dict, is_first: Any, key: Any) -> tuple:
        def refuse(x: np.ndarray) -> np.ndarray:
            if (x > 100).any():
                raise ValueError("too large")
            return x

        shape = jax.ShapeDtypeStruct(obs["vector"].shape, np.float32)
        x = jax.pure_callback(refuse, shape, obs["vector"], vmap_method="sequential")
        return carry + 1, x[:, :1], {}

    server = start(policy=Policy(lambda k: jnp.zeros(k), act), actors=1)
    inference = RemoteInference(Client(server), 0, 0)
    with pytest.raises(Exception, match="too large"):
        inference.act({"vector": np.full((ENVS, 2), 1000, np.float32)}, np.zeros(ENVS, bool))
    (actions,) = played(inference, stream(0, 1))
    assert np.isfinite(actions).all()
    server.close()


def test_who_waits_when_the_server_closes_hears_of_it():
    server = start(max_wait_ms=60_000.0)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            RemoteInference(Client(server), 0, 0).act(*stream(0, 1)[0])
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    server.close()
    thread.join(10)
    assert "closed" in str(failures[0])
    with pytest.raises(RuntimeError, match="closed"):
        RemoteInference(Client(server), 0, 0).act(*stream(0, 1)[0])
