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
    follow,
    learned_cost,
    learned_reward,
    look_at,
    look_away,
    scene_features,
    start_of,
    tracked_obstacles,
    tracked_reward,
)
from learner.layout import layout_of
from learner.rssm import Latent
from learner.scene import Scene, SceneModel, seen
from learner.world_model import WorldModel
from tests.learner.tiny import MODEL, SCENE, SPEC, filled

KEY = jax.random.PRNGKey(0)
NOWHERE = Latent(jnp.zeros(3), jnp.zeros((1, 2)))
LAYOUT = layout_of(SCENE)


def scene(hazards: Any, goal: Any = (1.0, 0.0), reward: Any = 0.0) -> Scene:
    hazards = jnp.asarray(hazards, jnp.float32)
    goal = jnp.broadcast_to(jnp.asarray(goal, jnp.float32), (*hazards.shape[:-2], 2))
    return Scene(jnp.zeros((*goal.shape[:-1], 3)), goal, hazards, jnp.zeros_like(goal), jnp.asarray(reward))


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
    state = State(NOWHERE, scene(np.zeros((2, 1, 2))))  # what is tracked does not count
    np.testing.assert_array_equal(decoded_hazards((2, 6), 0.25)(echo, state), [1.0, 0.0])


def test_the_tracked_scene_gives_costs_and_rewards() -> None:
    blind: Any = None
    state = State(NOWHERE, scene([[0.1, 0.0], [0.0, 0.2]], reward=0.7))
    assert float(tracked_obstacles(0.25)(blind, state)) == 2.0
    assert float(tracked_obstacles(0.15)(blind, state)) == 1.0
    assert float(tracked_reward(blind, state)) == pytest.approx(0.7)


def test_what_is_not_tracked_cannot_be_counted() -> None:
    with pytest.raises(TypeError, match="carries no scene"):
        tracked_obstacles(0.25)(None, State(NOWHERE, None))


def test_learned_reward_is_the_mean_of_the_head() -> None:
    model = filled(lambda: WorldModel(KEY, SPEC, MODEL, learn_cost=False))
    state = State(model.rssm.initial(2), None)
    np.testing.assert_array_equal(learned_reward(model, state), model.reward(state.latent).mean)


# --- states, step by step -----------------------------------------------------------------------

ACTION = jnp.array([[0.5, -1.0]])
VECTOR = jnp.asarray(np.random.default_rng(0).normal(size=(1, 13)), jnp.float32)


def test_latent_and_scene_go_on_together() -> None:
    model = filled(lambda: WorldModel(KEY, SCENE, MODEL, learn_cost=False, learn_motion=True))
    assert model.body is not None
    state = State(model.initial(1), look_at(LAYOUT)({"vector": VECTOR}))
    uniform = model.noise(KEY, 1)
    following = follow(model, state, ACTION, uniform)
    expected = model.rssm.img_step(state.latent, ACTION, uniform)
    np.testing.assert_array_equal(following.latent.deter, expected.deter)
    assert state.scene is not None
    assert following.scene is not None
    moved = model.body.move(state.scene, ACTION)
    np.testing.assert_array_equal(following.scene.obstacles, moved.obstacles)


def test_a_scene_alone_goes_on_without_a_latent() -> None:
    model = filled(lambda: SceneModel(KEY, SCENE, MODEL))
    state = State(model.initial(1), look_at(LAYOUT)({"vector": VECTOR}))
    following = follow(model, state, ACTION, model.noise(KEY, 1))
    assert following.latent.feat.shape == (1, 0)
    assert following.scene is not None
    assert not np.array_equal(following.scene.goal, state.scene.goal)  # pyright: ignore


def test_methods_that_track_nothing_need_no_motion() -> None:
    model = filled(lambda: WorldModel(KEY, SPEC, MODEL, learn_cost=False))
    state = State(model.initial(1), look_away({}))
    assert start_of(model, state, KEY) is state
    assert follow(model, state, ACTION, None).scene is None
    with pytest.raises(TypeError, match="learns no motion"):
        follow(model, State(model.initial(1), seen(LAYOUT, VECTOR)), ACTION, None)


def test_next_goals_are_drawn_where_imagination_starts() -> None:
    model = filled(lambda: SceneModel(KEY, SCENE, MODEL))
    around = seen(LAYOUT, jnp.repeat(VECTOR, 5, 0))
    many = start_of(model, State(model.initial(5), around), KEY, (5,)).scene
    assert many is not None
    assert len({tuple(goal) for goal in np.asarray(many.next_goal).tolist()}) == 5
    np.testing.assert_array_equal(many.goal, around.goal)


# --- features -----------------------------------------------------------------------------------


def test_the_scene_is_shown_with_its_nearest_hazards_in_order() -> None:
    hazards = np.array([[3.0, 0.0], [0.0, 0.3], [9.0, 9.0], [-1.0, 0.0], [0.0, -2.0]], np.float32)
    features = scene_features(LAYOUT)  # of two hazards
    many = scene_features(LAYOUT._replace(obstacles=((5, 9), (9, 15))))  # pyright: ignore

    def shown(order: list[int]) -> np.ndarray:
        around = scene(hazards[order], goal=(0.0, 0.6))._replace(body=jnp.array([1.0, 2.0, 3.0]))
        state = State(NOWHERE, around)
        numbers = np.asarray(many.read(state))
        np.testing.assert_array_equal(numbers[:5], LATENT.read(state))
        return numbers[5:]

    numbers = shown([0, 1, 2, 3, 4])
    assert numbers.shape == (many.extra,)
    np.testing.assert_allclose(numbers[:3], [1, 2, 3])
    np.testing.assert_allclose(numbers[3:9], [0, 0.6, np.exp(-2), 0.6, 0, 1], atol=2e-3)
    near = [[0, 0.3, np.exp(-1)], [-1, 0, np.exp(-1 / 0.3)], [0, -2, np.exp(-2 / 0.3)], [3, 0, np.exp(-10)]]
    np.testing.assert_allclose(numbers[9:-1].reshape(4, 3), near, atol=1e-5)
    assert numbers[-1] == 1.0
    np.testing.assert_allclose(shown([4, 2, 0, 1, 3]), numbers, atol=1e-6)  # the listed order does not matter
    state = State(NOWHERE, scene(hazards[:2]))
    assert features.read(state).shape == (5 + features.extra,) == (5 + 3 + 6 + 2 * 3 + 1,)
