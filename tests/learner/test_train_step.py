from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import AugmentedConfig, Config
from learner.actor_critic import imagine
from learner.cost_model import (
    State,
    learned_cost,
    look_at,
    scene_features,
    tracked_obstacles,
    tracked_reward,
)
from learner.lagrange import Constraint, augmented, augmented_update, unconstrained
from learner.layout import layout_of
from learner.returns import Moments
from learner.rssm import Latent
from learner.scene import seen
from learner.train_step import Shared, TrainState, TrainStep, _starts
from tests.learner.tiny import BEHAVIOR, CONFIG, FEAT, MODEL, SCENE, SPEC, batch

AUGMENTED = AugmentedConfig(multiplier=0.5, penalty=0.05)
CONSTRAINT = augmented(AUGMENTED, cost_limit=2.0)

Step = Callable[[TrainState, dict], tuple[TrainState, dict]]


def build(
    cfg: Config = CONFIG, constraint: Constraint = CONSTRAINT, *, costs: bool = True, plans: bool = False
) -> TrainStep:
    return TrainStep(
        SPEC, cfg, constraint, learned_cost, learn_cost=costs, value_cost=costs, shared=Shared(plans, False)
    )


@pytest.fixture(scope="module")
def start() -> TrainState:
    return build().start()


@pytest.fixture(scope="module")
def step() -> Step:
    """The one compilation of this file."""
    return jax.jit(build().step)


@pytest.fixture(scope="module")
def first(start: TrainState, step: Step) -> tuple[TrainState, dict]:
    return step(start, batch())


@pytest.fixture(scope="module")
def second(first: tuple[TrainState, dict], step: Step) -> tuple[TrainState, dict]:
    return step(first[0], batch(1))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


# --- a good update ------------------------------------------------------------------------------


def test_an_update_stays_finite_and_counts(second: tuple[TrainState, dict]) -> None:
    state, metrics = second
    assert all(np.isfinite(x).all() for x in leaves((state, metrics)))
    assert (int(state.updates), int(state.bad_in_row)) == (2, 0)
    expected = {"vector", "reward", "cost", "cont", "dyn", "rep", "actor", "critic", "cost_critic"}
    assert {name[5:] for name in metrics if name.startswith("loss/")} == expected
    assert all(x.shape == () for x in metrics.values())


def test_everything_is_trained(start: TrainState, second: tuple[TrainState, dict]) -> None:
    """Two updates: behind a zero-initialised output the first one has no gradient."""
    state, metrics = second
    for name in ("model", "actor", "critic", "cost_critic"):
        assert float(metrics[f"grad/{name}"]) > 0.0
        before, after = (getattr(s, name) for s in (start, state))
        before, after = (getattr(x, "fast", x) for x in (before, after))
        assert not any(np.array_equal(x, y) for x, y in zip(leaves(before), leaves(after), strict=True)), name


def test_adam_moves_by_its_learning_rate(start: TrainState, first: tuple[TrainState, dict]) -> None:
    # Adam's first step is lr * g / (|g| + eps): never more than lr.
    for name, lr in (("model", CONFIG.world_model.lr), ("actor", BEHAVIOR.lr)):
        before, after = (leaves(getattr(s, name)) for s in (start, first[0]))
        largest = max(np.abs(a - b).max() for a, b in zip(before, after, strict=True))
        assert largest == pytest.approx(lr, rel=0.02)


def test_slow_critics_are_copied_once_and_then_follow(
    first: tuple[TrainState, dict], second: tuple[TrainState, dict]
) -> None:
    for name in ("critic", "cost_critic"):
        copied, followed = (getattr(s[0], name) for s in (first, second))
        for fast, slow in zip(leaves(copied.fast), leaves(copied.slow), strict=True):
            np.testing.assert_allclose(slow, fast, atol=1e-7)
        for old, fast, slow in zip(*map(leaves, (copied.slow, followed.fast, followed.slow)), strict=True):
            np.testing.assert_allclose(slow, 0.98 * old + 0.02 * fast, atol=1e-7)


def test_the_multiplier_moves_by_its_rule_only(start: TrainState, first: tuple[TrainState, dict]) -> None:
    state, metrics = first
    expected = augmented_update(start.multiplier, metrics["safety/violation"], AUGMENTED)
    np.testing.assert_allclose(state.multiplier, expected, rtol=1e-6)
    assert float(metrics["safety/multiplier"]) == float(state.multiplier.multiplier)
    assert abs(float(state.multiplier.multiplier) - 0.5) > 1e-3


def test_moments_follow_the_imagined_returns(
    first: tuple[TrainState, dict], second: tuple[TrainState, dict]
) -> None:
    for name, metric in (("moments", "behavior/return"), ("cost_moments", "behavior/cost_return")):
        before, after = (getattr(state, name) for state, _ in (first, second))
        # 1 % of the way to the batch's percentiles, which lie around its mean.
        low, high = (float(y - 0.99 * x) / 0.01 for x, y in zip(before, after, strict=True))
        assert low < float(second[1][metric]) < high, name


def test_an_update_is_reproducible(start: TrainState, first: tuple[TrainState, dict], step: Step) -> None:
    assert equal(step(start, batch()), first)
    other = step(start._replace(key=jax.random.PRNGKey(9)), batch())
    assert not equal(other[0].model, first[0].model)
    assert not np.array_equal(first[0].key, start.key)


# --- a bad update -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vector", "reward", "cost", "action"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_nothing(
    first: tuple[TrainState, dict], step: Step, name: str, value: float
) -> None:
    state = first[0]
    bad = batch(1)
    bad[name][1, 1] = value
    skipped, metrics = step(state, bad)
    keep = {"key": state.key, "bad_in_row": state.bad_in_row}
    assert equal(skipped._replace(**keep), state)
    assert int(skipped.bad_in_row) == int(metrics["train/bad_in_row"]) == 1
    assert not np.array_equal(skipped.key, state.key)  # the next try draws other noise


def test_training_goes_on_after_bad_batches(
    first: tuple[TrainState, dict], second: tuple[TrainState, dict], step: Step
) -> None:
    bad = batch(1)
    bad["reward"][0, 0] = np.nan
    state = first[0]
    for _ in range(2):
        state, _ = step(state, bad)
    assert int(state.bad_in_row) == 2
    state, metrics = step(state, batch(1))
    assert (int(state.updates), int(state.bad_in_row)) == (2, 0)
    assert all(np.isfinite(x).all() for x in leaves((state, metrics)))
    assert not equal(state.model, first[0].model)


# --- the actor's objective ----------------------------------------------------------------------


def test_actor_loss_by_hand(start: TrainState) -> None:
    """-(weight (A / scale + entropy bonus)) + psi, from what the rollout itself returned."""
    cfg = dataclasses.replace(CONFIG, behavior=dataclasses.replace(BEHAVIOR, entropy=0.1))
    train = build(cfg)
    state = start._replace(moments=Moments(jnp.array(-2.0), jnp.array(2.0)))
    latents = jax.tree.map(lambda x: x + 0.1, state.model.initial(3))
    begin = State(latents, None)
    cont = jnp.array([1.0, 0.0, 1.0])
    key = jax.random.PRNGKey(0)

    @jax.jit
    def compute(state: TrainState) -> tuple:
        imagined = imagine(state.model, state.actor, begin, BEHAVIOR.horizon, key)
        loss, aux = train._actor_loss(state.actor, state.model, state, begin, cont, key)
        return loss, aux, imagined.entropy

    loss, (outcome, moments, _, violation, _), entropy = compute(state)
    reward, cost = outcome.reward, outcome.cost
    low, high = np.percentile(reward.return_, [5, 95])
    np.testing.assert_allclose(moments, (0.99 * -2 + 0.01 * low, 0.99 * 2 + 0.01 * high), rtol=1e-5)
    advantage = (reward.return_ - reward.value[:-1]) / (moments.high - moments.low)
    objective = (outcome.weight * (advantage + 0.1 * entropy)).mean()
    g = float(cost.return_.sum(0).mean() - 2.0)
    assert float(violation) == pytest.approx(g, rel=1e-5)
    psi = 0.5 * g + 0.025 * g**2 if 0.5 + 0.05 * g > 0 else -0.25 / 0.1
    assert float(loss) == pytest.approx(float(psi - objective), rel=1e-4)
    np.testing.assert_array_equal(outcome.weight[:, 1], 0.0)  # starts after an end do not count


# --- variants -----------------------------------------------------------------------------------


def test_a_method_without_costs_has_no_cost_critic() -> None:
    train = build(constraint=unconstrained(), costs=False)
    before = jax.eval_shape(train.init, 0)
    after, metrics = jax.eval_shape(train.step, before, batch())
    assert before.cost_critic is None
    assert before.cost_critic_opt is None
    assert before.model.cost_head is None
    assert not any("cost" in name for name in metrics)
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.parametrize("latent", [True, False])
def test_a_method_that_tracks_the_scene_learns_motion(latent: bool) -> None:
    layout = layout_of(SCENE)
    train = TrainStep(
        SCENE,
        dataclasses.replace(CONFIG, world_model=dataclasses.replace(MODEL, latent=latent)),
        CONSTRAINT,
        tracked_obstacles(0.25),
        learn_cost=False,
        value_cost=True,
        shared=Shared(False, False),
        features=scene_features(layout),
        look=look_at(layout),
        reward_model=tracked_reward,
    )
    before = jax.eval_shape(train.init, 0)
    data = batch() | {"vector": np.zeros((2, 4, 13), np.float32)}
    after, metrics = jax.eval_shape(train.step, before, data)
    assert {name for name in metrics if name in ("loss/motion", "loss/reward")} == (
        {"loss/motion", "loss/reward"} if latent else {"loss/motion"}
    )
    read = before.actor.mlp.layers[0].linear.weight.shape[0]
    assert read == latent * FEAT + scene_features(layout).extra
    assert jax.tree.structure(after) == jax.tree.structure(before)


def test_only_a_planner_is_sent_the_critic(start: TrainState) -> None:
    assert build().acting(start).critic is None
    acting = build(plans=True).acting(start)
    assert acting.critic is start.critic
    assert (acting.model, acting.actor) == (start.model, start.actor)


# --- where imagination starts -------------------------------------------------------------------


def starts(count: int) -> tuple[State, jax.Array]:
    cfg = dataclasses.replace(BEHAVIOR, imagine_starts=count)
    number = jnp.arange(8.0).reshape(2, 4)
    latents = Latent(jnp.repeat(number[..., None], 8, -1), jnp.zeros((2, 4, 2, 3)))
    states = State(latents, seen(layout_of(SCENE), number[..., None] * jnp.ones(13)))
    data = {"is_terminal": np.arange(8).reshape(2, 4) % 2 == 1}
    return _starts(states, data, cfg, jax.random.PRNGKey(0))


@pytest.mark.parametrize("count", [0, 8, 100])
def test_imagination_starts_everywhere(count: int) -> None:
    start, cont = starts(count)
    np.testing.assert_array_equal(start.latent.deter[:, 0], np.arange(8))
    np.testing.assert_array_equal(cont, [1, 0] * 4)


def test_imagination_starts_from_a_part_of_the_batch() -> None:
    start, cont = starts(3)
    chosen = np.asarray(start.latent.deter[:, 0])
    assert len(set(chosen)) == 3
    assert set(chosen) <= set(range(8))
    assert start.scene is not None
    np.testing.assert_array_equal(start.scene.goal[:, 0], chosen)  # latent, scene and cont stay together
    np.testing.assert_array_equal(cont, 1 - chosen % 2)
