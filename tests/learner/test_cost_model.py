from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learner.cost_model import (
    Anchor,
    Start,
    anchored_hazards,
    count_within,
    decoded_hazards,
    learned_cost,
    nearest_hazards,
)
from learner.rssm import Latent
from learner.world_model import WorldModel
from tests.learner.tiny import MODEL, SPEC, filled


def latent_of(vector: Any) -> Latent:
    """A latent that decodes to the vector, with `ECHO` as the model."""
    return Latent(jnp.asarray(vector, jnp.float32), jnp.zeros(()))


ECHO: Any = SimpleNamespace(decode=lambda latent: latent.deter)


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


def test_decoded_hazards_read_their_slice_only() -> None:
    cost = decoded_hazards((2, 6), 0.25)
    vector = [[0.0, 0.0, 0.1, 0.0, 5.0, 5.0], [0.0, 0.0, 5.0, 5.0, 5.0, 5.0]]
    start = Start(latent_of(vector), jnp.zeros((2, 6)))
    np.testing.assert_array_equal(cost(ECHO, start, latent_of(vector)), [1.0, 0.0])


# The robot is turned by 90 degrees at (3, 3); one hazard stands 1 m ahead of it, which is world +y.
ANCHOR = Anchor(hazards=(2, 4), rotation=(4, 6), position=(0, 2))
OBSERVED = [3.0, 3.0, 1.0, 0.0, 0.0, -1.0]
QUARTER, HALF = (0.0, -1.0), (-1.0, 0.0)  # first rows (cos, -sin) of headings of 90 and 180 degrees


def decoded(x: float, y: float, row: tuple[float, float]) -> list[float]:
    """Where the model sees the robot; its own idea of the hazard must not count."""
    return [x, y, 99.0, 99.0, *row]


def anchored_start() -> Start:
    # The model is 4 m off: only its moves count.
    return Start(latent_of([decoded(7, 7, QUARTER)]), jnp.array([OBSERVED]))


def test_anchored_hazards_turn_into_the_world_frame() -> None:
    cost = anchored_hazards(ANCHOR, 0.25)
    # It costs to drive there, and not to where the hazard would lie unturned.
    path = [[decoded(7, 7, QUARTER)], [decoded(7, 8, QUARTER)], [decoded(8, 7, QUARTER)]]
    np.testing.assert_array_equal(cost(ECHO, anchored_start(), latent_of(path)), [[0.0], [1.0], [0.0]])


def test_anchored_hazards_push_the_predicted_position_away() -> None:
    cost = anchored_hazards(ANCHOR, 0.25)

    def at(y: jax.Array) -> jax.Array:
        vector = jnp.array([decoded(7, 0, QUARTER)]).at[0, 1].set(y)
        return cost(ECHO, anchored_start(), latent_of(vector)).sum()

    assert float(jax.grad(at)(jnp.array(7.7))) > 0.5  # y grows towards the hazard


@pytest.mark.parametrize("times", [1, 2])
def test_anchored_hazards_in_the_robots_frame(times: int) -> None:
    # At the start as observed; half a metre nearer; turned left, the hazard lies to the right.
    path = [decoded(7, 7, QUARTER), decoded(7, 7.5, QUARTER), decoded(7, 7, HALF)]
    here = anchored_start()
    start = Start(latent_of(jnp.repeat(here.latent.deter, times, 0)), jnp.repeat(here.vector, times, 0))
    latents = latent_of(np.repeat(np.array(path)[:, None], times, 1))
    ego = ANCHOR.egocentric(ECHO, start, latents)
    expected = np.array([[[1.0, 0.0]], [[0.5, 0.0]], [[0.0, -1.0]]])
    np.testing.assert_allclose(ego, np.repeat(expected[:, None], times, 1), atol=1e-5)


def test_the_nearest_hazards_are_shown_in_order() -> None:
    anchor = Anchor(hazards=(0, 10), rotation=(10, 12), position=(12, 14))
    hazards = np.array([[3.0, 0.0], [0.0, 0.3], [9.0, 9.0], [-1.0, 0.0], [0.0, -2.0]], np.float32)
    features = nearest_hazards(anchor)

    def shown(order: list[int]) -> np.ndarray:
        vector = jnp.array([*hazards[order].ravel(), 1.0, 0.0, 0.0, 0.0], jnp.float32)
        latent = Latent(vector, jnp.zeros((1, 2)))
        return np.asarray(features.read(ECHO, Start(latent, vector), latent))[len(vector) + 2 :]

    numbers = shown([0, 1, 2, 3, 4])
    assert numbers.shape == (features.extra,)
    expected = [
        [0.0, 0.3, np.exp(-1)],
        [-1, 0, np.exp(-1 / 0.3)],
        [0, -2, np.exp(-2 / 0.3)],
        [3, 0, np.exp(-10)],
    ]
    np.testing.assert_allclose(numbers.reshape(4, 3), expected, atol=1e-5)
    np.testing.assert_allclose(shown([4, 2, 0, 1, 3]), numbers, atol=1e-6)  # the listed order does not matter


def test_learned_cost_is_the_mean_of_the_head() -> None:
    model = filled(lambda: WorldModel(jax.random.PRNGKey(0), SPEC, MODEL, learn_cost=True))
    latent = model.rssm.initial(2)
    start = Start(latent, jnp.zeros((2, 6)))
    np.testing.assert_array_equal(learned_cost(model, start, latent), model.cost(latent).mean)
