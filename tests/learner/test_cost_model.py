from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learner.cost_model import (
    LATENT,
    State,
    count_within,
    decoded_hazards,
    learned_cost,
    look_at,
    move,
    nearest_hazards,
    tracked_hazards,
)
from learner.geometry import heading_of
from learner.rssm import Latent
from learner.world_model import WorldModel
from tests.learner.tiny import MODEL, SPEC, filled

QUARTER = np.pi / 2
NOWHERE = Latent(jnp.zeros(3), jnp.zeros((1, 2)))


# --- counting -----------------------------------------------------------------------------------


def test_objects_within_the_radius_are_counted() -> None:
    offsets = jnp.array([[[0.1, 0.1], [0.3, 0.0], [0.0, -0.25]], [[1.0, 1.0], [0.0, 0.0], [-0.26, 0.0]]])
    np.testing.assert_array_equal(count_within(offsets, 0.25), [2.0, 1.0])


def test_the_count_is_exact_everywhere() -> None:
    offsets = np.random.default_rng(0).uniform(-0.4, 0.4, (500, 8, 2)).astype(np.float32)
    expected = (np.hypot(offsets[..., 0], offsets[..., 1]) <= 0.25).sum(-1)
    np.testing.assert_array_equal(count_within(jnp.array(offsets), 0.25), expected)


@pytest.mark.parametrize("distance", [0.2, 0.25, 0.3])
def test_moving_away_lowers_the_cost(distance: float) -> None:
    gradient = jax.grad(lambda offset: count_within(offset, 0.25))(jnp.array([[distance, 0.0]]))
    assert float(gradient[0, 0]) < -0.5
    assert float(gradient[0, 1]) == 0.0


def test_gradient_is_finite_on_top_of_a_hazard() -> None:
    gradient = jax.grad(lambda offset: count_within(offset, 0.25))(jnp.zeros((1, 2)))
    assert np.isfinite(gradient).all()


# --- cost models --------------------------------------------------------------------------------


def test_learned_cost_is_the_mean_of_the_head() -> None:
    model = filled(lambda: WorldModel(jax.random.PRNGKey(0), SPEC, MODEL, learn_cost=True))
    latent = model.rssm.initial(2)
    state = State(latent, None)
    np.testing.assert_array_equal(learned_cost(model, state), model.cost(latent).mean)


def test_decoded_hazards_read_their_slice_only() -> None:
    vector = jnp.array([[0.0, 0.0, 0.1, 0.0, 5.0, 5.0], [0.0, 0.0, 5.0, 5.0, 5.0, 5.0]])
    echo: Any = SimpleNamespace(decode_vector=lambda latent: vector)
    state = State(NOWHERE, jnp.zeros((2, 1, 2)))  # what is tracked does not count
    np.testing.assert_array_equal(decoded_hazards((2, 6), 0.25)(echo, state), [1.0, 0.0])


def test_tracked_hazards_count_what_is_tracked() -> None:
    blind: Any = None
    state = State(NOWHERE, look_at((2, 6))({"vector": jnp.array([9.0, 9.0, 0.1, 0.0, 0.0, 0.2])}))
    assert float(tracked_hazards(0.25)(blind, state)) == 2.0
    assert float(tracked_hazards(0.15)(blind, state)) == 1.0


# --- motion -------------------------------------------------------------------------------------


def moving(x: float, y: float, turn: float) -> Any:
    return SimpleNamespace(motion=lambda latent: (jnp.array([x, y]), heading_of(jnp.array(turn))))


@pytest.mark.parametrize(
    ("motion", "hazard", "expected"),
    [
        ((0.0, 0.0, 0.0), (1.0, 2.0), (1.0, 2.0)),
        ((0.5, 0.0, 0.0), (1.0, 0.0), (0.5, 0.0)),  # driving towards it
        ((0.0, 0.0, QUARTER), (1.0, 0.0), (0.0, -1.0)),  # turned left, it lies to the right
        ((1.0, 1.0, QUARTER), (1.0, 2.0), (1.0, 0.0)),  # moved, then turned towards it
    ],
)
def test_hazards_pass_by_as_the_robot_moves(
    motion: tuple[float, float, float], hazard: tuple[float, float], expected: tuple[float, float]
) -> None:
    hazards = jnp.array([hazard, hazard])
    moved = move(moving(*motion), hazards, NOWHERE)
    assert moved is not None
    np.testing.assert_allclose(moved, [expected] * 2, atol=1e-6)


def test_methods_that_track_nothing_need_no_motion() -> None:
    blind: Any = None
    assert move(blind, None, NOWHERE) is None


def test_hazards_are_read_in_pairs() -> None:
    hazards = look_at((1, 5))({"vector": jnp.array([[0.0, 1, 2, 3, 4, 5]])})
    assert hazards is not None
    np.testing.assert_array_equal(hazards, [[[1, 2], [3, 4]]])


# --- features -----------------------------------------------------------------------------------


def test_the_nearest_hazards_are_shown_in_order() -> None:
    hazards = np.array([[3.0, 0.0], [0.0, 0.3], [9.0, 9.0], [-1.0, 0.0], [0.0, -2.0]], np.float32)
    features = nearest_hazards(len(hazards))

    def shown(order: list[int]) -> np.ndarray:
        state = State(NOWHERE, jnp.array(hazards[order]))
        numbers = np.asarray(features.read(state))
        np.testing.assert_array_equal(numbers[:5], LATENT.read(state))
        return numbers[5:]

    numbers = shown([0, 1, 2, 3, 4])
    assert numbers.shape == (features.extra,) == (12,)
    near = [[0, 0.3, np.exp(-1)], [-1, 0, np.exp(-1 / 0.3)], [0, -2, np.exp(-2 / 0.3)], [3, 0, np.exp(-10)]]
    np.testing.assert_allclose(numbers.reshape(4, 3), near, atol=1e-5)
    np.testing.assert_allclose(shown([4, 2, 0, 1, 3]), numbers, atol=1e-6)  # the listed order does not matter


def test_a_task_may_have_few_hazards() -> None:
    features = nearest_hazards(2)
    state = State(NOWHERE, jnp.ones((2, 2)))
    assert features.read(state).shape == (5 + features.extra,) == (5 + 6,)
