from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.distributions import Bernoulli, BoundedNormal, OneHot, TwoHot, two_hot, uniform_mix

BINS = jnp.array([-1.0, 0.0, 1.0])
WIDE = jnp.linspace(-20, 20, 255)
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6)


def log(*probs: float) -> jax.Array:
    return jnp.log(jnp.array([probs]))


# --- two-hot ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (0.25, [0.0, 0.75, 0.25]),
        (-0.25, [0.25, 0.75, 0.0]),
        (1.0, [0.0, 0.0, 1.0]),
        (7.0, [0.0, 0.0, 1.0]),
        (-7.0, [1.0, 0.0, 0.0]),
    ],
)
def test_two_hot_by_hand(x: float, weights: list[float]) -> None:
    np.testing.assert_allclose(two_hot(jnp.array(x), BINS), weights, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-25, 25, width=32), min_size=4, max_size=4))
def test_two_hot_weights_have_the_value_as_mean(values: list[float]) -> None:
    weights = np.asarray(two_hot(jnp.array(values, jnp.float32), WIDE))
    assert ((weights > 1e-4).sum(-1) <= 2).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=3e-5)
    np.testing.assert_allclose((weights * np.asarray(WIDE)).sum(-1), np.clip(values, -20, 20), atol=1e-3)


def test_two_hot_mean_is_symexp_of_the_expected_bin() -> None:
    head = TwoHot(jnp.log(jnp.array([1e-30, 0.5, 0.5])), BINS)
    assert float(head.mean) == pytest.approx(np.exp(0.5) - 1, rel=1e-5)


def test_two_hot_mean_of_large_logits_is_finite_and_has_its_gradient() -> None:
    def plainly(logits: jax.Array) -> jax.Array:
        x = (jax.nn.softmax(logits) * BINS).sum(-1)
        return jnp.sign(x) * jnp.expm1(jnp.abs(x))

    logits = jnp.array([[900.0, 901.0, 899.0], [-900.0, -901.0, -900.5]])
    mean, derivative = jax.vjp(lambda x: TwoHot(x, BINS).mean, logits)
    expected, derived = jax.vjp(plainly, logits)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_allclose(derivative(jnp.ones(2))[0], derived(jnp.ones(2))[0], rtol=1e-4, atol=1e-6)


def test_two_hot_log_prob_by_hand() -> None:
    head = TwoHot(jnp.log(jnp.array([0.2, 0.3, 0.5])), BINS)
    x = np.exp(0.25) - 1  # symlog(x) = 0.25
    expected = 0.75 * np.log(0.3) + 0.25 * np.log(0.5)
    assert float(head.log_prob(jnp.array(x))) == pytest.approx(expected, rel=1e-5)
    # Far outside the range all weight is on the last bin.
    assert float(head.log_prob(jnp.array(1e6))) == pytest.approx(np.log(0.5), rel=1e-5)


def test_two_hot_loss_pulls_the_mean_to_the_target() -> None:
    def loss(logits: jax.Array) -> jax.Array:
        return -TwoHot(logits, WIDE).log_prob(jnp.array(3.0))

    step = jax.jit(lambda logits: logits - 2.0 * jax.grad(loss)(logits))
    logits = jnp.zeros(255)
    for _ in range(200):
        logits = step(logits)
    assert float(TwoHot(logits, WIDE).mean) == pytest.approx(3.0, abs=0.05)


# --- one-hot ------------------------------------------------------------------------------------


def test_uniform_mix_by_hand() -> None:
    probs = uniform_mix(jnp.array([100.0, 0.0, 0.0, 0.0]), 0.01)
    np.testing.assert_allclose(probs, [0.9925, 0.0025, 0.0025, 0.0025], rtol=1e-5)


def test_samples_are_exactly_one_hot() -> None:
    probs = uniform_mix(jax.random.normal(jax.random.PRNGKey(1), (64, 3, 5)), 0.01)
    sample = np.asarray(OneHot(probs).sample(jax.random.PRNGKey(0)))
    assert set(np.unique(sample)) == {0.0, 1.0}
    np.testing.assert_array_equal(sample.sum(-1), 1.0)


def test_samples_follow_the_probabilities() -> None:
    probs = jnp.broadcast_to(jnp.array([0.2, 0.3, 0.5]), (4000, 1, 3))
    frequency = OneHot(probs).sample(jax.random.PRNGKey(0)).mean((0, 1))
    np.testing.assert_allclose(frequency, [0.2, 0.3, 0.5], atol=0.03)


@pytest.mark.parametrize(
    ("uniform", "index"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (1.0, 2)]
)
def test_sample_with_inverts_the_cumulative_distribution(uniform: float, index: int) -> None:
    one_hot = OneHot(jnp.array([[0.2, 0.3, 0.5]]))
    np.testing.assert_array_equal(one_hot.sample_with(jnp.array([uniform])), np.eye(3)[[index]])


def test_sample_with_no_noise_is_the_mode_with_a_gradient() -> None:
    probs, weight = jnp.array([[0.2, 0.5, 0.3]]), jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(OneHot(probs).sample_with(None), OneHot(probs).mode())
    gradient = jax.grad(lambda x: (weight * OneHot(x).sample_with(None)).sum())(probs)
    np.testing.assert_array_equal(gradient, weight)


def test_straight_through_gradient_is_that_of_the_probabilities() -> None:
    weight = jnp.array([[1.0, 2.0, 3.0]])

    def objective(logits: jax.Array) -> jax.Array:
        return (weight * OneHot(jnp.exp(logits)).sample_with(jnp.full((1,), 0.4))).sum()

    # d exp(l) / dl = p, hence w p.
    np.testing.assert_allclose(jax.grad(objective)(log(0.2, 0.3, 0.5)), [[0.2, 0.6, 1.5]], rtol=1e-6)


def test_mode_is_the_likeliest_class_and_carries_no_gradient() -> None:
    probs = jnp.array([[0.2, 0.5, 0.3]])
    np.testing.assert_array_equal(OneHot(probs).mode(), [[0, 1, 0]])
    gradient = jax.grad(lambda x: (OneHot(x).mode() * jnp.arange(3.0)).sum())(probs)
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))


def test_entropy_and_kl_by_hand() -> None:
    p = OneHot(jnp.array([[0.5, 0.5], [0.5, 0.5]]))  # S = 2
    q = OneHot(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    assert float(p.entropy()) == pytest.approx(2 * np.log(2), rel=1e-6)
    assert float(p.kl(q)) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(LOGITS, LOGITS)
def test_kl_is_not_negative_and_zero_only_for_itself(a: list[float], b: list[float]) -> None:
    p, q = (OneHot(uniform_mix(jnp.array(x, jnp.float32).reshape(2, 3), 0.01)) for x in (a, b))
    assert float(p.kl(q)) >= -1e-5
    assert float(p.kl(p)) == 0.0


# --- Bernoulli and bounded normal ---------------------------------------------------------------


def test_bernoulli_by_hand() -> None:
    cont = Bernoulli(jnp.array([np.log(3.0), -200.0]))  # probability 0.75, and 0
    np.testing.assert_array_equal(cont.mode, [1.0, 0.0])
    np.testing.assert_allclose(cont.log_prob(jnp.array([1.0, 0.0])), [np.log(0.75), 0.0], atol=1e-6)
    np.testing.assert_allclose(cont.log_prob(jnp.array([False, True])), [np.log(0.25), -200.0], rtol=1e-5)


def test_bounded_normal_by_hand() -> None:
    policy = BoundedNormal.from_raw(jnp.array([0.0, 1.0]), jnp.array([0.0, -1.0]))
    std = 0.9 / (1 + np.exp([-2.0, -1.0])) + 0.1
    np.testing.assert_allclose(policy.mean, [0.0, np.tanh(1.0)], rtol=1e-6)
    np.testing.assert_allclose(policy.std, std, rtol=1e-6)
    np.testing.assert_allclose(
        policy.sample_with(jnp.array([2.0, -1.0])), policy.mean + std * [2, -1], rtol=1e-5
    )
    assert float(policy.entropy()) == pytest.approx(
        (0.5 * np.log(2 * np.pi * np.e) + np.log(std)).sum(), rel=1e-5
    )


def test_std_stays_between_its_bounds() -> None:
    std = BoundedNormal.from_raw(jnp.zeros(2), jnp.array([-1e3, 1e3])).std
    np.testing.assert_allclose(std, [0.1, 1.0], rtol=1e-6)
