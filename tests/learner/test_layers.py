from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.layers import (
    MLP,
    Classes,
    Dense,
    Head,
    LayerNorm,
    Linear,
    join,
    standardize,
    symexp,
    symlog,
    truncated_normal,
)

KEY = jax.random.PRNGKey(0)
VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


def test_symlog_by_hand() -> None:
    np.testing.assert_allclose(symlog(jnp.array([0.0, np.e - 1, 1 - np.e])), [0.0, 1.0, -1.0], rtol=1e-6)
    np.testing.assert_allclose(symexp(jnp.array([0.0, 1.0, -2.0])), [0.0, np.e - 1, 1 - np.e**2], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_symexp_inverts_symlog(values: list[float]) -> None:
    x = np.array(values, np.float32)
    np.testing.assert_allclose(symexp(symlog(jnp.array(x))), x, rtol=2e-5, atol=1e-30)


def test_truncated_normal_has_the_published_spread() -> None:
    kernel = np.asarray(truncated_normal(KEY, (96, 32)))
    assert kernel.std() == pytest.approx(np.sqrt(1 / 64), rel=0.03)
    assert np.abs(kernel).max() <= 2 * np.sqrt(1 / 64) / 0.8796256 + 1e-6
    quarter = truncated_normal(KEY, (96, 32), 0.25)
    np.testing.assert_allclose(quarter, kernel / 2, rtol=1e-5)


def test_outscale_zero_starts_at_zero() -> None:
    head = Head(KEY, 4, 5, 1, 3, outscale=0.0)
    np.testing.assert_array_equal(head(jnp.ones((2, 4))), np.zeros((2, 3)))


def test_classes_are_read_as_the_one_hot_vectors_they_stand_for() -> None:
    linear, x = Linear(KEY, 4 + 6 + 1, 5), jax.random.normal(KEY, (7, 4))
    index = jax.random.randint(KEY, (7, 2), 0, 3)
    one_hot = jax.nn.one_hot(index, 3).reshape(7, 6)
    parts = join(join(x, Classes(index, 3)), x[:, :1])
    assert isinstance(parts, tuple)
    expected = linear(join(x, one_hot, x[:, :1]))
    np.testing.assert_allclose(linear(parts), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(linear)(parts), expected, rtol=1e-5, atol=1e-6)
    for layers in (0, 1):
        head = Head(KEY, 11, 5, layers, 3)
        expected = head(join(x, one_hot, x[:, :1]))
        np.testing.assert_allclose(head(parts), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_by_hand() -> None:
    norm = LayerNorm(2)
    # mean 2, variance 1: +-1 / sqrt(1 + 1e-3)
    np.testing.assert_allclose(norm(jnp.array([1.0, 3.0])), np.array([-1, 1]) / np.sqrt(1.001), rtol=1e-6)


def test_the_written_out_gradient_is_the_derived_one() -> None:
    def plainly(x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)

    x, g = 3.0 + jax.random.normal(KEY, (2, 5, 7, 33))
    y, derivative = jax.vjp(standardize, x)
    expected, derived = jax.vjp(plainly, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(derivative(g)[0], derived(g)[0], rtol=1e-4, atol=2e-5)


def test_layer_norm_computes_in_float32() -> None:
    y = LayerNorm(2)(jnp.array([-1e4, 1e4], jnp.float16))  # squares overflow float16
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(y, np.float32), [-1.0, 1.0], rtol=1e-3)


def test_dense_is_silu_of_norm_without_bias() -> None:
    dense = Dense(KEY, 3, 4)
    x = jnp.array([[1.0, -2.0, 0.5]])
    assert dense.linear.bias is None
    y = np.asarray(dense.norm(x @ dense.linear.weight))
    np.testing.assert_allclose(dense(x), y / (1 + np.exp(-y)), rtol=1e-5)


def test_linear_adds_its_bias() -> None:
    linear = Linear(KEY, 2, 2)
    moved = jax.tree.map(lambda x: x + 1.0, linear)
    x = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(moved(x), x @ (linear.weight + 1) + 1, rtol=1e-6)


def test_mlp_stacks_layers() -> None:
    mlp = MLP(KEY, 3, 5, 2)
    x = jnp.ones((2, 3))
    assert [layer.linear.weight.shape for layer in mlp.layers] == [(3, 5), (5, 5)]
    np.testing.assert_allclose(mlp(x), mlp.layers[1](mlp.layers[0](x)), rtol=1e-6)


def test_a_head_without_hidden_layers_is_linear() -> None:
    head = Head(KEY, 3, 5, 0, 2)
    x = jnp.array([1.0, 2.0, -1.0])
    np.testing.assert_allclose(head(x), x @ head.out.weight, rtol=1e-6)
