from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learner.cost_model import Start, anchored_hazards, count_within, decoded_hazards, learned_cost
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


def test_anchored_hazards_turn_into_the_world_frame() -> None:
    # The robot is turned by 90 degrees: (cos, -sin) = (0, -1). A hazard 1 m ahead of it (ego x) lies at
    # world offset (0, 1). Driving there costs, driving to where it would lie unturned does not.
    cost = anchored_hazards((2, 4), (4, 6), (0, 2), 0.25)
    observed = jnp.array([[3.0, 3.0, 1.0, 0.0, 0.0, -1.0]])
    start = Start(latent_of([[7.0, 7.0, 0, 0, 0, 0]]), observed)  # decodes another position: only moves count
    path = [[[7.0, 7.0, 0, 0, 0, 0]], [[7.0, 8.0, 0, 0, 0, 0]], [[8.0, 7.0, 0, 0, 0, 0]]]
    np.testing.assert_array_equal(cost(ECHO, start, latent_of(path)), [[0.0], [1.0], [0.0]])


def test_anchored_hazards_push_the_predicted_position_away() -> None:
    cost = anchored_hazards((2, 4), (4, 6), (0, 2), 0.25)
    start = Start(latent_of(jnp.zeros(6)), jnp.array([0.0, 0.0, 0.3, 0.0, 1.0, 0.0]))
    gradient = jax.grad(lambda x: cost(ECHO, start, latent_of(x)).sum())(jnp.zeros(6))
    assert float(gradient[0]) > 0.5  # x grows towards the hazard


def test_learned_cost_is_the_mean_of_the_head() -> None:
    model = filled(lambda: WorldModel(jax.random.PRNGKey(0), SPEC, MODEL, learn_cost=True))
    latent = model.rssm.initial(2)
    start = Start(latent, jnp.zeros((2, 6)))
    np.testing.assert_array_equal(learned_cost(model, start, latent), model.cost(latent).mean)
