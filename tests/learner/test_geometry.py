from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.geometry import heading_of, opposite, relative_motion, rotate

ANGLES = st.floats(-3, 3, width=32)


def test_rotate_by_hand() -> None:
    left = heading_of(jnp.array(np.pi / 2))
    np.testing.assert_allclose(rotate(jnp.array([1.0, 2.0]), left), [-2.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(rotate(jnp.array([1.0, 2.0]), opposite(left)), [2.0, -1.0], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(ANGLES, ANGLES)
def test_headings_compose_as_angles_add(a: float, b: float) -> None:
    composed = rotate(heading_of(jnp.array(a)), heading_of(jnp.array(b)))
    np.testing.assert_allclose(composed, [np.cos(a + b), np.sin(a + b)], atol=1e-5)


def test_relative_motion_by_hand() -> None:
    # At (1, 1) facing +y; drives 2 m ahead and turns left, now facing -x; drives 1 m ahead.
    position = jnp.array([[1.0, 1.0], [1.0, 3.0], [0.0, 3.0]])
    row = jnp.array([[0.0, -1.0], [-1.0, 0.0], [-1.0, 0.0]])  # (cos, -sin)
    displacement, turned = relative_motion(position, row)
    np.testing.assert_allclose(displacement, [[2.0, 0.0], [1.0, 0.0]], atol=1e-5)
    np.testing.assert_allclose(turned, [np.pi / 2, 0.0], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(ANGLES, ANGLES)
def test_angles_wrap_around(before: float, after: float) -> None:
    row = np.array([[np.cos(x), -np.sin(x)] for x in (before, after)], np.float32)
    _, turned = relative_motion(jnp.zeros((2, 2)), jnp.array(row))
    np.testing.assert_allclose(np.exp(1j * turned[0]), np.exp(1j * (after - before)), atol=1e-4)
