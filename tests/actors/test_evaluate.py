from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actors.evaluate import Recorder, evaluate, evaluation_seeds, play, random_policy
from common.types import ArraySpec, EnvSpec, Policy, Step

SPEC = EnvSpec("Scripted", {"vector": ArraySpec((1,))}, 1, 5, 50)


class OnceEnv:
    """Environment i plays an episode of i + 1 agent steps (5 env steps each), then waits for the others.

    The reward is the action, the cost 1 per agent step.
    """

    spec = SPEC

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.partial = np.zeros(num_envs, bool)
        self.finished = np.ones(num_envs, bool)
        self.rendered: list[int] = []
        self.seen: list[np.ndarray] = []
        self._t = np.zeros(num_envs, int)

    def step(self, actions: np.ndarray) -> Step:
        k = self.num_envs
        assert actions.shape == (k, 1)
        self.seen.append(actions)
        if self.finished.all():
            self.finished, self._t = np.zeros(k, bool), np.full(k, -1)
        first = self._t == -1
        moving = ~first & ~self.finished
        self._t = np.where(first, 0, self._t + moving)
        is_last = moving & (self._t == np.arange(k) + 1)
        self.finished |= is_last
        return Step(
            obs={"vector": self._t[:, None].astype(np.float32)},
            reward=np.where(moving, actions[:, 0], 0).astype(np.float32),
            cost=moving.astype(np.float32),
            is_first=first,
            is_last=is_last,
            is_terminal=np.zeros(k, bool),
            env_steps=np.where(moving, 5, 0).astype(np.int32),
        )

    def render(self, index: int) -> np.ndarray:
        self.rendered.append(index)
        return np.full((4, 4, 3), self._t[0], np.uint8)

    def close(self) -> None: ...


def _act(params: Any, carry: Any, obs: dict, is_first: Any, key: Any) -> tuple:
    """Acts params + (decisions so far in the episode) / 10."""
    carry = jnp.where(is_first, 0, carry + 1)
    return carry, (params + carry / 10)[:, None].astype(jnp.float32), {}


POLICY = Policy(lambda k: jnp.zeros(k, jnp.int32), _act)
NOISE = Policy(lambda k: (), lambda p, c, obs, first, key: (c, jax.random.normal(key, (len(first), 1)), {}))


def test_every_environment_gives_one_result():
    results = evaluate(OnceEnv(3), POLICY, 0.5, seed=0, version=4)
    assert results is not None
    assert [r.source for r in results] == ["eval/env0", "eval/env1", "eval/env2"]
    assert [r.length for r in results] == [5, 10, 15]
    assert [r.cost for r in results] == [1.0, 2.0, 3.0]
    # 0.5 after the reset, then 0.6, 0.7: nothing is counted after an episode's end.
    np.testing.assert_allclose([r.return_ for r in results], [0.5, 1.1, 1.8], rtol=1e-6)
    assert {r.version for r in results} == {4}


def test_an_evaluation_can_be_repeated_exactly():
    env = OnceEnv(3)
    first = evaluate(env, NOISE, None, seed=1)
    assert first == evaluate(env, NOISE, None, seed=1) == evaluate(OnceEnv(3), NOISE, None, seed=1)
    assert first != evaluate(env, NOISE, None, seed=2)
    fresh = OnceEnv(3)
    evaluate(fresh, NOISE, None, seed=0)
    assert len(np.unique(fresh.seen[1:])) == 9  # no key is used twice


def test_playing_step_by_step_gives_the_results_after_the_last_step():
    *before, results = play(OnceEnv(3), POLICY, 0.5, seed=0, version=4)
    assert len(before) > 2
    assert not any(before)
    assert results == evaluate(OnceEnv(3), POLICY, 0.5, seed=0, version=4)


def test_pictures_are_of_the_first_episode_alone():
    env = OnceEnv(3)
    frames: list[tuple] = []

    def on_frame(frame: np.ndarray, obs: dict, reward: float, cost: float) -> None:
        assert obs["vector"].shape == (1,)
        frames.append((int(frame[0, 0, 0]), float(obs["vector"][0]), reward, cost))

    evaluate(env, POLICY, 0.5, seed=0, on_frame=on_frame)
    assert frames == [(0, 0.0, 0.0, 0.0), (1, 1.0, pytest.approx(0.5), 1.0)]
    assert env.rendered == [0, 0]


def test_whole_episodes_of_the_first_environments_are_recorded():
    recorder = Recorder(2)
    plain = evaluate(OnceEnv(3), POLICY, 0.5, seed=0)
    assert evaluate(OnceEnv(3), POLICY, 0.5, seed=0, on_step=recorder) == plain
    first, second = recorder.episodes()
    np.testing.assert_array_equal(first["vector"][:, 0], [0, 1])  # not while it waits for the others
    np.testing.assert_array_equal(second["vector"][:, 0], [0, 1, 2])
    # The action beside an observation was chosen there; its reward (the action) came with the next one.
    np.testing.assert_allclose(second["action"][:, 0], [0.5, 0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(second["reward"], [0.0, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(second["cost"], [0, 1, 1])


def test_more_episodes_may_be_asked_for_than_are_played():
    recorder = Recorder(9)
    evaluate(OnceEnv(2), POLICY, 0.5, seed=0, on_step=recorder)
    assert len(recorder.episodes()) == 2


def test_evaluation_seeds_do_not_depend_on_their_number_and_differ():
    seeds = evaluation_seeds(0, 20)
    assert evaluation_seeds(0, 5) == seeds[:5]
    assert len({*seeds, *evaluation_seeds(1, 20)}) == 40
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_untrained_policy_is_uniform():
    policy = random_policy(4, 3)
    keys = jax.random.split(jax.random.PRNGKey(0), 200)
    actions = np.stack([policy.act(None, policy.init(4), {}, np.ones(4, bool), key)[1] for key in keys])
    assert actions.shape == (200, 4, 3)
    assert (np.abs(actions) <= 1).all()
    assert abs(actions.mean()) < 0.05
    assert abs(actions.std() - 1 / np.sqrt(3)) < 0.02
