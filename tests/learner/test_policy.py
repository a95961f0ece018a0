from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.types import Policy
from learner import planner
from learner.actor_critic import Actor, Critic
from learner.cost_model import State, learned_cost
from learner.policy import ActingParams, Carry, actor_choice, make_policy, planner_choice
from learner.rssm import Latent
from learner.world_model import WorldModel
from tests.learner.tiny import BEHAVIOR, FEAT, MODEL, PLANNER, SPEC, filled

KEY = jax.random.PRNGKey(0)
K, ROWS = 3, PLANNER.horizon + 1


def build(choose: Any, rows: int) -> Policy:
    def look(obs: Mapping[str, jax.Array]) -> Any:
        return obs["vector"][:, 2:]

    policy = make_policy(choose, MODEL.deter, MODEL.stoch, MODEL.classes, 2, rows)
    return Policy(policy.init, jax.jit(policy.act))


EXPLORING = build(actor_choice(explore=True), 0)
EVALUATING = build(actor_choice(explore=False), 0)
PLANNING = build(planner_choice(learned_cost, PLANNER, BEHAVIOR, 2.0, explore=False), ROWS)


@pytest.fixture(scope="module")
def params() -> ActingParams:
    return ActingParams(
        filled(lambda: WorldModel(KEY, SPEC, MODEL, learn_cost=True)),
        filled(lambda: Actor(KEY, FEAT, 2, BEHAVIOR), seed=1, scale=0.2),
        filled(lambda: Critic(KEY, FEAT, BEHAVIOR, MODEL), seed=2),
    )


def observation(seed: int = 0) -> dict[str, np.ndarray]:
    return {"vector": np.random.default_rng(seed).normal(size=(K, 6)).astype(np.float32)}


def some_carry(rows: int, seed: int = 0) -> Carry:
    rng = np.random.default_rng(seed)
    latent = EXPLORING.init(K).latent._replace(deter=jnp.array(rng.normal(size=(K, 8)), jnp.float32))
    action, plan = rng.uniform(-1, 1, (K, 2)), rng.uniform(-1, 1, (K, rows, 2))
    return Carry(latent, jnp.array(action, jnp.float32), jnp.array(plan, jnp.float32))


FIRST = np.array([True, True, True])
LATER = np.array([False, False, False])


def pick(tree: Any, index: slice) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


@pytest.mark.parametrize("policy", [EXPLORING, PLANNING], ids=["actor", "planner"])
def test_a_batch_of_one_acts_as_a_batch_of_many(policy: Policy, params: ActingParams) -> None:
    """Environment 0 draws the same noise whatever the number of environments (partitionable threefry)."""
    carry = some_carry(policy.init(K).plan.shape[1])
    many, actions, _ = policy.act(params, carry, observation(), LATER, KEY)
    one, action, _ = policy.act(params, pick(carry, slice(1)), pick(observation(), slice(1)), LATER[:1], KEY)
    np.testing.assert_allclose(action[0], actions[0], atol=1e-5)
    np.testing.assert_allclose(one.latent.deter[0], many.latent.deter[0], atol=1e-5)
    assert np.abs(np.diff(actions, axis=0)).min() > 1e-4  # others act differently


@pytest.mark.parametrize("policy", [EXPLORING, PLANNING], ids=["actor", "planner"])
def test_environments_do_not_see_each_other(policy: Policy, params: ActingParams) -> None:
    rows = policy.init(K).plan.shape[1]
    carry, other = some_carry(rows), some_carry(rows, seed=1)
    keep = np.array([False, True, False])

    def mixed(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda x, y: np.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)

    ours, actions, _ = policy.act(params, carry, observation(), LATER, KEY)
    args = (mixed(carry, other), mixed(observation(), observation(1)), ~keep, KEY)
    theirs, other_actions, _ = policy.act(params, *args)
    np.testing.assert_array_equal(actions[1], other_actions[1])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
    assert np.abs(ours.latent.deter[0] - theirs.latent.deter[0]).max() > 1e-3


@pytest.mark.parametrize("policy", [EXPLORING, PLANNING], ids=["actor", "planner"])
def test_is_first_forgets_everything(policy: Policy, params: ActingParams) -> None:
    rubbish = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), policy.init(K))
    carry, actions, _ = policy.act(params, rubbish, observation(), FIRST, KEY)
    fresh, expected, _ = policy.act(params, policy.init(K), observation(), FIRST, KEY)
    np.testing.assert_array_equal(actions, expected)
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(actions).all()


def test_the_plan_starts_from_the_last_one_shifted(
    params: ActingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "plan", lambda score, mean, *rest: planner.Plan(mean, {}))
    carry = some_carry(ROWS)
    flags = np.array([False, True, False])
    policy = build(planner_choice(learned_cost, PLANNER, BEHAVIOR, 2.0, explore=False), ROWS)
    following, actions, _ = policy.act(params, carry, observation(), flags, KEY)
    for i in (0, 2):
        expected = np.concatenate([carry.plan[i, 1:], carry.plan[i, -1:]])
        np.testing.assert_array_equal(following.plan[i], expected)
        np.testing.assert_array_equal(actions[i], carry.plan[i, 1])
    np.testing.assert_array_equal(following.plan[1], 0.0)  # a new episode, a new plan


def test_the_carried_action_is_the_one_taken(params: ActingParams) -> None:
    carry, actions, _ = EXPLORING.act(params, some_carry(0), observation(), LATER, KEY)
    np.testing.assert_array_equal(carry.action, actions)
    assert float(np.abs(actions).max()) <= 1.0
    # The model consumes it at the next step.
    other = carry._replace(action=-carry.action)
    before, after = (
        EXPLORING.act(params, c, observation(1), LATER, KEY)[0].latent.deter for c in (carry, other)
    )
    assert np.abs(before - after).max(-1).min() > 1e-4


def test_policies_filter_as_training_does(params: ActingParams) -> None:
    key_state, _ = jax.random.split(KEY)
    carry = some_carry(0)
    following, _, _ = EXPLORING.act(params, carry, observation(), LATER, KEY)
    uniform = jax.random.uniform(key_state, (K, MODEL.stoch))

    def filtered(model: WorldModel, obs: dict) -> Latent:
        embed = model.encode(obs)
        return model.rssm.obs_step(carry.latent, carry.action, jnp.array(LATER), embed, uniform)

    expected = jax.jit(filtered)(params.model, observation())
    np.testing.assert_allclose(following.latent.deter, expected.deter, atol=1e-5)
    np.testing.assert_allclose(following.latent.stoch, expected.stoch, atol=1e-6)


def test_exploration_samples_and_evaluation_does_not(params: ActingParams) -> None:
    carry = some_carry(0)
    following, actions, _ = EVALUATING.act(params, carry, observation(), LATER, KEY)
    np.testing.assert_allclose(actions, params.actor(following.latent.feat).mean, rtol=1e-5)
    explored = [EXPLORING.act(params, carry, observation(), LATER, k)[1] for k in jax.random.split(KEY, 2)]
    assert np.abs(explored[0] - explored[1]).max(-1).min() > 1e-3  # in every environment


def test_the_scene_is_seen_as_it_is(params: ActingParams) -> None:
    seen = []

    def choose(params: ActingParams, state: State, plan: jax.Array, key: jax.Array) -> tuple:
        seen.append(state.scene)
        return jnp.zeros((K, 2)), plan, {}

    def look(obs: Mapping[str, jax.Array]) -> Any:
        return obs["vector"][:, 2:]

    policy = make_policy(choose, MODEL.deter, MODEL.stoch, MODEL.classes, 2, 0, look)
    obs = observation()
    policy.act(params, policy.init(K), obs, FIRST, KEY)
    np.testing.assert_array_equal(seen[0], obs["vector"][:, 2:])


def test_planner_reports_what_it_expects(params: ActingParams) -> None:
    _, _, stats = PLANNING.act(params, some_carry(ROWS), observation(), LATER, KEY)
    assert set(stats) == {"plan/num_safe", "plan/return", "plan/cost", "plan/std", "plan/iterations"}
    assert all(np.isfinite(x) and x.shape == () for x in stats.values())


def test_acting_with_the_actor_needs_no_critic(params: ActingParams) -> None:
    args = (params._replace(critic=None), some_carry(0), observation(), LATER, KEY)
    _, actions, _ = jax.eval_shape(EXPLORING.act, *args)
    assert actions.shape == (K, 2)
