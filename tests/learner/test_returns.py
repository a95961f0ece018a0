from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.returns import Moments, lambda_return, trajectory_weight

FLOATS = st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5)
SHARES = st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5)

compute = jax.jit(lambda_return)


def test_lambda_return_by_hand() -> None:
    # R_2 = v_2 = 10;  R_1 = 2 + 0.5 (0.5 * 10 + 0.5 * 10) = 7;  R_0 = 1 + 0.9 (0.5 * 4 + 0.5 * 7) = 5.95
    reward, value, discount = jnp.array([1.0, 2.0]), jnp.array([4.0, 10.0]), jnp.array([0.9, 0.5])
    np.testing.assert_allclose(lambda_return(reward, value, discount, 0.5), [5.95, 7.0], rtol=1e-6)


def test_an_end_cuts_the_return() -> None:
    reward, value = jnp.array([1.0, 2.0, 100.0]), jnp.array([50.0, 50.0, 50.0])
    returns = lambda_return(reward, value, jnp.array([0.9, 0.0, 0.9]), 0.95)
    assert float(returns[1]) == 2.0
    assert float(returns[0]) == pytest.approx(1 + 0.9 * (0.05 * 50 + 0.95 * 2), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(FLOATS, FLOATS, SHARES, st.floats(0, 1, width=32))
def test_lambda_return_is_the_mixture_of_n_step_returns(
    reward: list[float], value: list[float], discount: list[float], lambda_: float
) -> None:
    horizon = 5
    n_step = []
    for n in range(1, horizon + 1):
        product, total = 1.0, 0.0
        for t in range(n):
            total += product * reward[t]
            product *= discount[t]
        n_step.append(total + product * value[n - 1])
    weights = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, horizon)] + [lambda_ ** (horizon - 1)]
    rewards, values, discounts = (jnp.array(x) for x in (reward, value, discount))
    ours = compute(rewards, values, discounts, lambda_)
    assert float(ours[0]) == pytest.approx(np.dot(weights, n_step), rel=1e-4, abs=1e-4)


def test_returns_of_a_batch_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    reward, value, discount = jnp.array(rng.uniform(0, 1, (3, 4, 2)), jnp.float32)
    both = lambda_return(reward, value, discount, 0.95)
    for n in range(2):
        alone = lambda_return(reward[:, n], value[:, n], discount[:, n], 0.95)
        np.testing.assert_allclose(both[:, n], alone, rtol=1e-6)


def test_trajectory_weight_by_hand() -> None:
    cont = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    expected = [[1.0, 0.0], [0.9, 0.0], [0.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(trajectory_weight(cont, 0.9), expected, rtol=1e-6)


def test_moments_follow_the_percentiles() -> None:
    returns = jnp.arange(101.0).reshape(1, 101)  # 5 % = 5, 95 % = 95
    first = Moments.init().update(returns, 0.9)
    np.testing.assert_allclose(first, (0.5, 9.5), rtol=1e-5)
    second = first.update(returns, 0.9)
    np.testing.assert_allclose(second, (0.95, 18.05), rtol=1e-5)
    assert float(second.scale) == pytest.approx(17.1, rel=1e-5)


def test_small_returns_are_not_blown_up() -> None:
    assert float(Moments(jnp.array(0.2), jnp.array(0.3)).scale) == 1.0
