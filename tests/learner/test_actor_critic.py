from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from learner.actor_critic import Actor, Critic, Imagined, Signal, critic_loss, evaluate, imagine
from learner.cost_model import Features, State, learned_cost
from learner.rssm import Latent
from learner.world_model import WorldModel
from tests.learner.tiny import BEHAVIOR, FEAT, MODEL, SPEC, filled

KEY = jax.random.PRNGKey(0)
STATES, HORIZON = 3, BEHAVIOR.horizon


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return filled(lambda: WorldModel(KEY, SPEC, MODEL, learn_cost=False))


@pytest.fixture(scope="module")
def actor() -> Actor:
    return filled(lambda: Actor(KEY, FEAT, 2, BEHAVIOR), seed=1)


@pytest.fixture(scope="module")
def critic() -> Critic:
    return filled(lambda: Critic(KEY, FEAT, BEHAVIOR, MODEL), seed=2)


@pytest.fixture(scope="module")
def start() -> State:
    deter = np.linspace(-1, 1, STATES * 8, dtype=np.float32).reshape(STATES, 8)
    stoch = np.eye(3, dtype=np.float32)[[[0, 2], [1, 1], [2, 0]]]
    return State(Latent(jnp.array(deter), jnp.array(stoch)), None)


# --- imagination --------------------------------------------------------------------------------


def test_imagination_follows_the_actor_step_by_step(model: WorldModel, actor: Actor, start: State) -> None:
    imagined = jax.jit(imagine, static_argnums=3)(model, actor, start, HORIZON, KEY)
    key_action, key_state = jax.random.split(KEY)
    noise = jax.random.normal(key_action, (HORIZON, STATES, 2))
    uniform = jax.random.uniform(key_state, (HORIZON, STATES, 2))

    @jax.jit
    def step(latent: Latent, noise: jax.Array, uniform: jax.Array) -> tuple[Latent, jax.Array]:
        policy = actor(latent.feat)
        return model.rssm.img_step(latent, policy.mean + policy.std * noise, uniform), policy.entropy()

    latent, latents = start.latent, imagined.states.latent
    for t in range(HORIZON):
        np.testing.assert_allclose(latents.deter[t], latent.deter, atol=1e-5)
        np.testing.assert_allclose(latents.stoch[t], latent.stoch, atol=1e-6)
        latent, entropy = step(latent, noise[t], uniform[t])
        np.testing.assert_allclose(imagined.entropy[t], entropy, rtol=1e-5)
    np.testing.assert_allclose(latents.deter[HORIZON], latent.deter, atol=1e-5)


def test_the_actor_reads_the_features(model: WorldModel, start: State) -> None:
    actor = filled(lambda: Actor(KEY, 8, 2, BEHAVIOR))
    features = Features(0, lambda state: 2 * state.latent.deter)
    imagined = jax.jit(imagine, static_argnums=(3, 5))(model, actor, start, 1, KEY, features)
    np.testing.assert_allclose(imagined.entropy[0], actor(2 * start.latent.deter).entropy(), rtol=1e-5)


def test_gradient_reaches_the_actor_through_the_model(model: WorldModel, actor: Actor, start: State) -> None:
    # One step ahead, `deter` is a smooth function of the action as long as that is within bounds (a narrow
    # distribution sees to it): backpropagation must equal differences.
    actor = eqx.tree_at(lambda a: a.std.bias, actor, jnp.array([-8.0, -8.0]))

    def objective(actor: Actor) -> jax.Array:
        return imagine(model, actor, start, 1, KEY).states.latent.deter[1].sum()

    gradient = jax.jit(jax.grad(objective))(actor)
    compute = jax.jit(objective)
    flat, restore = ravel_pytree(actor)
    direction = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
    step = 1e-2
    up, down = (compute(restore(flat + sign * step * direction)) for sign in (1, -1))
    slope = float(up - down) / (2 * step)
    assert abs(slope) > 0.1
    predicted = float(ravel_pytree(gradient)[0] @ direction)
    assert predicted == pytest.approx(slope, rel=0.02)


# --- returns of imagined trajectories -----------------------------------------------------------


def fake_model(reward: np.ndarray, cont: np.ndarray) -> Any:
    return SimpleNamespace(
        reward=lambda following: SimpleNamespace(mean=jnp.array(reward[1:])),
        cont=lambda following: SimpleNamespace(mode=jnp.array(cont[1:])),
    )


def by_hand(reward: np.ndarray, value: np.ndarray, cont: np.ndarray) -> np.ndarray:
    returns, following = [], value[-1]
    for t in reversed(range(HORIZON)):
        discount = BEHAVIOR.gamma * cont[t + 1]
        following = reward[t + 1] + discount * (0.05 * value[t + 1] + 0.95 * following)
        returns.append(following)
    return np.stack(returns[::-1])


@pytest.fixture(scope="module")
def imagined(start: State) -> Imagined:
    rng = np.random.default_rng(4)
    deter = rng.normal(size=(HORIZON + 1, STATES, 8)).astype(np.float32)
    stoch = jnp.broadcast_to(start.latent.stoch, (HORIZON + 1, *start.latent.stoch.shape))
    states = State(Latent(jnp.array(deter), stoch), None)
    return Imagined(states, jnp.zeros((HORIZON, STATES)))


def test_reward_and_cost_share_one_return(imagined: Imagined, critic: Critic) -> None:
    rng = np.random.default_rng(0)
    reward, cost = rng.normal(size=(2, HORIZON + 1, STATES)).astype(np.float32)
    cont = np.ones((HORIZON + 1, STATES), np.float32)
    cont[2, 0] = 0.0
    outcome = evaluate(
        imagined,
        jnp.array([1.0, 0.0, 1.0]),
        fake_model(reward, cont),
        critic,
        (cost_critic := filled(lambda: Critic(KEY, FEAT, BEHAVIOR, MODEL), seed=3)),
        lambda model, following: jnp.array(cost[1:]),
        BEHAVIOR,
    )
    assert outcome.cost is not None
    np.testing.assert_array_equal(outcome.feat, imagined.states.latent.feat)
    for signal, predicted, judge in ((outcome.reward, reward, critic), (outcome.cost, cost, cost_critic)):
        value = np.asarray(judge.value(outcome.feat).mean)
        np.testing.assert_allclose(signal.value, value, rtol=1e-5)
        np.testing.assert_allclose(signal.return_, by_hand(predicted, value, cont), rtol=1e-4, atol=1e-5)
    # Weights: what is left of an episode; the first state's continuation is the real one.
    expected = np.array([[1, 0, 1], [0.9, 0, 0.9], [0, 0, 0.81]])
    np.testing.assert_allclose(outcome.weight, expected, rtol=1e-5)


def test_a_method_without_costs_has_no_cost_signal(imagined: Imagined, critic: Critic) -> None:
    def no_cost(model: Any, state: State) -> jax.Array:
        raise AssertionError("not asked for")

    zeros = np.zeros((HORIZON + 1, STATES), np.float32)
    model = fake_model(zeros, zeros + 1)
    outcome = evaluate(imagined, jnp.ones(STATES), model, critic, None, no_cost, BEHAVIOR)
    assert outcome.cost is None


def test_critics_read_the_features(imagined: Imagined) -> None:
    critic = filled(lambda: Critic(KEY, 8, BEHAVIOR, MODEL))
    zeros = np.zeros((HORIZON + 1, STATES), np.float32)
    features = Features(0, lambda state: 2 * state.latent.deter)
    model = fake_model(zeros, zeros + 1)
    outcome = evaluate(imagined, jnp.ones(STATES), model, critic, None, learned_cost, BEHAVIOR, features)
    expected = critic.value(2 * imagined.states.latent.deter).mean
    np.testing.assert_allclose(outcome.reward.value, expected, rtol=1e-5)


# --- critic -------------------------------------------------------------------------------------


def test_critic_loss_by_hand(imagined: Imagined, critic: Critic) -> None:
    feat = imagined.states.latent.feat[:-1]
    target = jnp.linspace(-3, 5, HORIZON * STATES).reshape(HORIZON, STATES)
    weight = jnp.linspace(0, 1, HORIZON * STATES).reshape(HORIZON, STATES)

    @jax.jit
    def log_probs(critic: Critic) -> tuple[jax.Array, jax.Array]:
        fast, slow = critic.value(feat), critic.slow_value(feat)
        return fast.log_prob(target), fast.log_prob(slow.mean)

    on_target, on_slow = log_probs(critic)
    expected = float(-(weight * (on_target + on_slow)).mean())
    loss, gradient = jax.jit(jax.value_and_grad(critic_loss))(critic, feat, target, weight)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient.fast))
    for x in jax.tree.leaves(gradient.slow):  # the slow copy is a target, never trained
        np.testing.assert_array_equal(x, 0.0)


def test_the_slow_copy_follows(critic: Critic) -> None:
    full, part = critic.follow(1.0), critic.follow(0.02)
    leaves = [jax.tree.leaves(x) for x in (critic.fast, critic.slow, full.slow, part.slow, part.fast)]
    for fast, slow, copied, moved, untouched in zip(*leaves, strict=True):
        np.testing.assert_allclose(copied, fast, atol=1e-6)
        np.testing.assert_allclose(moved, 0.98 * slow + 0.02 * fast, atol=1e-6)
        np.testing.assert_array_equal(untouched, fast)


def test_advantage_by_hand() -> None:
    signal = Signal(jnp.array([[3.0], [5.0]]), jnp.array([[1.0], [2.0], [9.0]]), 4.0)
    np.testing.assert_allclose(signal.advantage, [[0.5], [0.75]])


def test_a_fresh_critic_values_everything_at_zero() -> None:
    critic = jax.jit(lambda: Critic(KEY, FEAT, BEHAVIOR, MODEL))()
    feat = jnp.linspace(-1, 1, 2 * FEAT).reshape(2, FEAT)
    np.testing.assert_allclose(critic.value(feat).mean, 0.0, atol=1e-6)
    np.testing.assert_allclose(critic.slow_value(feat).mean, 0.0, atol=1e-6)
