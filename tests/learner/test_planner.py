from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import PlannerConfig
from learner.actor_critic import Actor, Critic
from learner.cost_model import State, learned_cost
from learner.planner import (
    Plan,
    Scores,
    actor_proposals,
    correlated_noise,
    elite_indices,
    model_score,
    plan,
    shift,
)
from learner.returns import lambda_return
from learner.world_model import WorldModel
from tests.learner.tiny import BEHAVIOR, FEAT, MODEL, PLANNER, SPEC, filled

KEY = jax.random.PRNGKey(0)
CANDIDATES, ELITES = 12, 4
VALUES = st.lists(st.integers(-3, 3), min_size=CANDIDATES, max_size=CANDIDATES)

elites = jax.jit(partial(elite_indices, count=ELITES))


def chosen(objective: list[float], cost: list[float], limit: float) -> set[int]:
    costs = np.array(cost, np.float32)
    indices = elites(np.array(objective, np.float32), costs, costs <= limit)
    assert indices.shape == (ELITES,)
    return {int(i) for i in indices}


# --- elites -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(VALUES, VALUES, st.integers(-3, 3))
def test_elites_by_the_rules(objective: list[float], cost: list[float], limit: int) -> None:
    picked = chosen(objective, cost, limit)
    assert len(picked) == ELITES  # no candidate twice
    safe = {i for i in range(CANDIDATES) if cost[i] <= limit}
    others = set(range(CANDIDATES)) - picked
    if len(safe) >= ELITES:
        assert picked <= safe
        assert min(objective[i] for i in picked) >= max((objective[i] for i in safe - picked), default=-9)
    else:
        # Lowest cost, ties in cost broken by the higher objective.
        assert max((cost[i], -objective[i]) for i in picked) <= min((cost[i], -objective[i]) for i in others)


def test_the_unsafe_candidate_0_is_never_elected() -> None:
    objective = [100.0] + [float(i) for i in range(1, 12)]
    cost = [5.0, 0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5]
    assert chosen(objective, cost, 1.0) == {3, 4, 5, 6}


def test_exactly_enough_safe_candidates() -> None:
    cost = [9.0, 0, 9, 9, 1, 9, 9, 1, 9, 9, 1, 9]
    assert chosen([-float(c == 1) for c in cost], cost, 1.0) == {1, 4, 7, 10}


def test_fewer_safe_than_elites_takes_the_cheapest() -> None:
    cost = [9.0, 0, 8, 7, 6, 5, 4, 3, 2, 9, 9, 9]
    assert chosen([0.0] * 12, cost, 1.0) == {1, 8, 7, 6}


def test_ties_in_cost_are_broken_by_return() -> None:
    objective = [0.0, 5, 1, 7, 2, 6, 3, 4, 0, 0, 0, 0]
    assert chosen(objective, [3.0] * 12, 1.0) == {1, 3, 5, 7}


def test_all_safe_takes_the_best() -> None:
    assert chosen([float(i) for i in range(12)], [0.0] * 12, 0.0) == {8, 9, 10, 11}


# --- the iteration ------------------------------------------------------------------------------

ROWS = 3  # horizon 2
NO_PROPOSALS = jnp.zeros((0, ROWS, 2))
SEARCH = PlannerConfig(samples=128, elites=12, iterations=8, horizon=2)


def towards_half(candidates: jax.Array, key: jax.Array) -> Scores:
    """Best: every action 0.5. The first action's x costs what it has above 0.2."""
    return_ = -jnp.square(candidates[:, :2] - 0.5).sum((1, 2))
    return Scores(return_, return_, jnp.maximum(0.0, candidates[:, 0, 0] - 0.2))


run = jax.jit(plan, static_argnums=(0, 4, 5))


def test_finds_the_optimum_without_a_limit() -> None:
    result = run(towards_half, jnp.zeros((ROWS, 2)), NO_PROPOSALS, KEY, SEARCH, 100.0)
    np.testing.assert_allclose(result.mean[:2], 0.5, atol=0.03)
    assert float(result.stats["num_safe"]) == 128


def test_finds_the_constrained_optimum() -> None:
    result = run(towards_half, jnp.zeros((ROWS, 2)), NO_PROPOSALS, KEY, SEARCH, 0.0)
    np.testing.assert_allclose(result.mean[:2], [[0.2, 0.5], [0.5, 0.5]], atol=0.03)
    assert float(result.mean[0, 0]) <= 0.2 + 1e-6
    assert float(result.stats["cost"]) == 0.0


def test_reaches_safety_from_an_unsafe_plan() -> None:
    unsafe = jnp.full((ROWS, 2), 0.9)
    cautious = dataclasses.replace(SEARCH, init_std=0.4)  # hardly a safe sequence in the first draw
    result = run(towards_half, unsafe, NO_PROPOSALS, KEY, cautious, 0.0)
    assert float(result.mean[0, 0]) <= 0.2 + 1e-6
    assert float(result.stats["num_safe"]) >= SEARCH.elites


def test_candidates_are_clipped() -> None:
    def score(candidates: jax.Array, key: jax.Array) -> Scores:
        outside = (jnp.abs(candidates) > 1.0).any((1, 2))
        return_ = candidates.sum((1, 2))
        return Scores(return_, return_, outside.astype(jnp.float32))

    result = run(score, jnp.full((ROWS, 2), 0.9), NO_PROPOSALS, KEY, SEARCH, 0.0)
    assert float(result.stats["num_safe"]) == SEARCH.samples
    assert float(result.mean.max()) <= 1.0


def by_first_action(candidates: jax.Array, key: jax.Array) -> Scores:
    return_ = candidates[:, 0, 0]
    return Scores(return_, return_, jnp.zeros(candidates.shape[0]))


def plan_among_two_proposals(momentum: float) -> Plan:
    # Drawn sequences stay near the mean (0); the two proposals score higher and are the elites.
    cfg = PlannerConfig(samples=6, elites=2, iterations=1, horizon=2, init_std=1e-3, momentum=momentum)
    proposals = jnp.stack([jnp.full((ROWS, 2), 0.4), jnp.full((ROWS, 2), 0.8)])
    return run(by_first_action, jnp.full((ROWS, 2), -0.5), proposals, KEY, cfg, 0.0)


def test_mean_and_momentum_by_hand() -> None:
    np.testing.assert_allclose(plan_among_two_proposals(0.1).mean, -0.05 + 0.9 * 0.6, rtol=1e-5)
    np.testing.assert_allclose(plan_among_two_proposals(0.0).mean, 0.6, rtol=1e-5)


def test_stats_by_hand() -> None:
    stats = {name: float(x) for name, x in plan_among_two_proposals(0.1).stats.items()}
    expected = {"num_safe": 8.0, "return": 0.6, "cost": 0.0, "std": 0.2, "iterations": 1.0}
    assert stats == pytest.approx(expected, rel=1e-5)


def test_a_tolerance_ends_the_iterations_once_the_mean_rests() -> None:
    patient = dataclasses.replace(SEARCH, iterations=20)
    adaptive = dataclasses.replace(patient, tolerance=0.02)
    whole, early = (
        run(towards_half, jnp.zeros((ROWS, 2)), NO_PROPOSALS, KEY, cfg, 100.0) for cfg in (patient, adaptive)
    )
    assert float(whole.stats["iterations"]) == 20
    count = int(early.stats["iterations"])
    assert 2 <= count < 20
    np.testing.assert_allclose(early.mean[:2], 0.5, atol=0.1)


def test_each_environment_ends_its_own_iterations() -> None:
    cfg = dataclasses.replace(SEARCH, iterations=20, tolerance=0.02, init_std=0.1)
    means = jnp.stack([jnp.full((ROWS, 2), 0.5), jnp.full((ROWS, 2), -0.9)])  # at the goal, and far from it

    def plan_one(mean: jax.Array) -> Plan:
        return plan(towards_half, mean, NO_PROPOSALS, KEY, cfg, 100.0)

    together = jax.jit(jax.vmap(plan_one))(means)
    near, far = together.stats["iterations"]
    assert near < far
    for i in range(2):
        np.testing.assert_allclose(together.mean[i], jax.jit(plan_one)(means[i]).mean, rtol=1e-5, atol=1e-6)


def test_the_spread_of_the_elites_is_the_next_std() -> None:
    def score(candidates: jax.Array, key: jax.Array) -> Scores:
        spread = candidates.std(0).max()
        return_ = candidates[:, 0, 0]
        return Scores(return_, return_, jnp.full(candidates.shape[0], spread))

    # A single elite has no spread: all candidates of the second iteration are alike.
    cfg = PlannerConfig(samples=16, elites=1, iterations=2, horizon=2, momentum=0.0)
    result = run(score, jnp.zeros((ROWS, 2)), NO_PROPOSALS, KEY, cfg, 0.0)
    assert float(result.stats["cost"]) < 1e-6
    assert float(result.stats["num_safe"]) in (0.0, 16.0)
    assert float(np.abs(result.mean).max()) > 0.1


def test_shift_moves_the_plan_one_step_on() -> None:
    moved = shift(jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))
    np.testing.assert_array_equal(moved, [[2, 20], [3, 30], [3, 30]])


# --- scores and proposals of the model ----------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return filled(lambda: WorldModel(KEY, SPEC, MODEL, learn_cost=True))


@pytest.fixture(scope="module")
def start(model: WorldModel) -> State:
    return State(model.rssm.initial(), None)


def test_scores_follow_the_model(model: WorldModel, start: State) -> None:
    critic = filled(lambda: Critic(KEY, FEAT, BEHAVIOR, MODEL), seed=1)

    @jax.jit
    def scores(candidates: jax.Array) -> list[Scores]:
        """Unscaled, and scaled to an episode of 1000 steps."""
        configs = [dataclasses.replace(PLANNER, cost_scale_length=length) for length in (0, 1000)]
        return [
            model_score(model, critic, learned_cost, start, c, BEHAVIOR)(candidates, KEY) for c in configs
        ]

    @jax.jit
    def by_hand(candidates: jax.Array) -> Scores:
        uniform = jax.random.uniform(KEY, (3, 5, 2))
        latent = jax.tree.map(lambda x: jnp.broadcast_to(x, (5, *x.shape)), start.latent)
        latents = []
        for t in range(3):
            latent = model.rssm.img_step(latent, candidates[:, t], uniform[t])
            latents.append(latent)
        path = jax.tree.map(lambda *x: jnp.stack(x), *latents)
        discount = BEHAVIOR.gamma * model.cont(path).mode
        return_ = lambda_return(model.reward(path).mean, critic.value(path.feat).mean, discount, 0.95)[0]
        return Scores(return_, return_, model.cost(path).mean.sum(0))

    candidates = np.random.default_rng(0).uniform(-1, 1, (5, 4, 2)).astype(np.float32)
    expected = by_hand(candidates)
    for ours, factor in zip(scores(candidates), (1.0, 1000 / 3), strict=True):
        np.testing.assert_allclose(ours.return_, expected.return_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.cost, factor * expected.cost, rtol=1e-4, atol=1e-3)
    # The last row of a plan lies beyond the horizon.
    beyond = candidates.copy()
    beyond[:, 3] += 0.1
    np.testing.assert_array_equal(scores(beyond)[0].return_, scores(candidates)[0].return_)


def test_proposals_are_the_actors(model: WorldModel, start: State) -> None:
    actor = filled(lambda: Actor(KEY, FEAT, 2, BEHAVIOR), seed=2)
    sequences = jax.jit(actor_proposals, static_argnums=(3, 4))(model, actor, start, 200, 3, KEY)
    assert sequences.shape == (200, 4, 2)
    policy = actor(start.latent.feat)
    expected = np.asarray(policy.sample_with(jax.random.normal(KEY, (4000, 2))))
    np.testing.assert_allclose(sequences[:, 0].mean(0), expected.mean(0), atol=0.15)
    np.testing.assert_allclose(sequences[:, 0].std(0), expected.std(0), atol=0.15)
    assert actor_proposals(model, actor, start, 0, 3, KEY).shape == (0, 4, 2)


# --- correlated noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_noise_is_correlated_along_a_sequence_alone(correlation: float) -> None:
    noise = np.asarray(correlated_noise(KEY, (20_000, 4, 2), correlation))
    np.testing.assert_allclose(noise.std(0), 1.0, atol=0.02)
    for lag in (1, 2, 3):
        found = (noise[:, 0] * noise[:, lag]).mean(0)
        np.testing.assert_allclose(found, correlation**lag, atol=0.03)
    across = (noise[:, 0, 0] * noise[:, 0, 1]).mean(), (noise[1:, 0] * noise[:-1, 0]).mean()
    np.testing.assert_allclose(across, 0.0, atol=0.03)


def test_uncorrelated_noise_is_the_published_one() -> None:
    drawn = correlated_noise(KEY, (3, 4, 2), 0.0)
    np.testing.assert_array_equal(drawn, jax.random.normal(KEY, (3, 4, 2)))
