from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from common.types import ArraySpec
from learner.geometry import relative_motion
from learner.layers import symlog
from learner.layout import Lidar, body_of, echoes, layout_of
from tests.learner.tiny import SCENE

REACH = 3.0
BINS = 16
LIDARS = dataclasses.replace(
    SCENE,
    obs={"vector": ArraySpec((71,))},
    slices={
        "velocimeter": (0, 3),
        "gyro": (3, 4),
        "magnetometer": (4, 7),
        "goal_lidar": (7, 23),
        "hazards_lidar": (23, 39),
        "buttons_lidar": (39, 55),
        "vases_lidar": (55, 71),
    },
)


def scan(objects: list[tuple[float, float]]) -> np.ndarray:
    """The package's pseudo lidar with aliasing, of objects at egocentric (x, y)."""
    reading = np.zeros(BINS)
    width = 2 * np.pi / BINS
    for x, y in objects:
        near = max(0.0, REACH - np.hypot(x, y)) / REACH
        angle = np.arctan2(y, x) % (2 * np.pi)
        index = int(angle / width)
        share = angle / width - index
        for place, value in ((index, near), (index + 1, share * near), (index - 1, (1 - share) * near)):
            reading[place % BINS] = max(reading[place % BINS], value)
    return reading


# --- positions ----------------------------------------------------------------------------------


def test_positions_are_read_out_of_the_observation() -> None:
    layout, vector = layout_of(SCENE), jnp.arange(13.0) - 4
    np.testing.assert_allclose(body_of(layout, vector), symlog(jnp.array([-4.0, -3.0, -2.0])))
    np.testing.assert_array_equal(layout.goal_of(vector), [-1, 0])
    np.testing.assert_array_equal(layout.obstacles_of(vector), [[1, 2], [3, 4]])
    assert layout.objects == layout.hazards == layout.shown == 2


def test_vases_that_cost_are_obstacles_too() -> None:
    slices = {**SCENE.slices, "hazards": (5, 7), "vases": (7, 9)}
    assert SCENE.scene is not None
    task = dataclasses.replace(SCENE.scene, obstacles=("hazards", "vases"))
    layout = layout_of(dataclasses.replace(SCENE, slices=slices, scene=task))
    np.testing.assert_array_equal(layout.obstacles_of(jnp.arange(13.0)), [[5, 6], [7, 8]])
    assert (layout.objects, layout.hazards) == (2, 1)


def test_nothing_may_cost() -> None:
    assert SCENE.scene is not None
    layout = layout_of(dataclasses.replace(SCENE, scene=dataclasses.replace(SCENE.scene, obstacles=())))
    assert layout.obstacles_of(jnp.zeros((4, 13))).shape == (4, 0, 2)
    assert layout.hazards == layout.shown == 0


def test_motion_is_that_between_poses() -> None:
    vector = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 13)), jnp.float32)
    displacement, turn = layout_of(SCENE).motion(vector)
    expected = relative_motion(vector[..., 11:13], vector[..., 9:11])
    np.testing.assert_array_equal(displacement, expected[0])
    np.testing.assert_array_equal(turn, expected[1])


@pytest.mark.parametrize("missing", ["goal", "hazards", "position", "rotation"])
def test_what_makes_a_scene_must_be_observed(missing: str) -> None:
    slices = {name: part for name, part in SCENE.slices.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        layout_of(dataclasses.replace(SCENE, slices=slices))
    with pytest.raises(KeyError, match="goal"):
        layout_of(dataclasses.replace(SCENE, scene=None))


# --- lidar --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.05, 0.7, 2.9])
def test_an_object_by_itself_is_found_exactly(distance: float) -> None:
    for angle in np.linspace(0, 2 * np.pi, 41, endpoint=False):
        place = distance * np.array([np.cos(angle), np.sin(angle)])
        reading = jnp.asarray(scan([(float(place[0]), float(place[1]))]), jnp.float32)
        places = np.asarray(echoes(reading, REACH))
        assert np.linalg.norm(places - place, axis=-1).min() < 1e-3
        # Whatever else there seems to be lies farther off: nothing is nearer than it is.
        assert np.linalg.norm(places, axis=-1).min() == pytest.approx(distance, abs=1e-5)


def test_the_nearest_of_many_is_never_far_off() -> None:
    """Neighbours may push it to the border of its bin, 22.5 degrees at most; its distance is right."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        objects = rng.uniform(-2, 2, (8, 2))
        places = np.asarray(echoes(jnp.asarray(scan([tuple(o) for o in objects]), jnp.float32), REACH))
        nearest = objects[np.hypot(*objects.T).argmin()]
        distance = np.hypot(*nearest)
        error = np.linalg.norm(places - nearest, axis=-1).min()
        assert error <= 2 * distance * np.sin(np.pi / BINS) + 1e-3
        assert np.linalg.norm(places, axis=-1).min() == pytest.approx(distance, abs=1e-4)


def lidars(goal: list, hazards: list, buttons: list) -> jnp.ndarray:
    parts = [np.zeros(7), scan(goal), scan(hazards), scan(buttons), scan([(0.1, 0.1)])]
    return jnp.asarray(np.concatenate(parts), jnp.float32)


def layout_with(*obstacles: str) -> Lidar:
    assert LIDARS.scene is not None
    task = dataclasses.replace(LIDARS.scene, obstacles=obstacles)
    layout = layout_of(dataclasses.replace(LIDARS, scene=task))
    assert isinstance(layout, Lidar)
    return layout


def test_a_scene_is_read_out_of_lidars() -> None:
    layout = layout_with("hazards")
    vector = lidars([(1.0, 1.0)], [(0.5, 0.0), (-1.0, 0.2)], [(0.3, 0.3)])
    np.testing.assert_allclose(layout.goal_of(vector), [1, 1], atol=1e-4)
    obstacles = np.asarray(layout.obstacles_of(vector))
    assert obstacles.shape == (layout.objects, 2) == (16, 2)
    for hazard in ((0.5, 0.0), (-1.0, 0.2)):
        assert np.linalg.norm(obstacles - hazard, axis=-1).min() < 1e-3
    assert np.linalg.norm(obstacles, axis=-1).min() > 0.49  # vases and buttons do not cost here
    assert body_of(layout, vector).shape == (4,)  # neither compass nor lidars
    assert layout.shown == 8


def test_the_button_to_be_pressed_is_no_obstacle() -> None:
    layout = layout_with("buttons", "hazards")
    buttons = [(1.0, 1.0), (-1.0, 0.5)]
    obstacles = np.asarray(layout.obstacles_of(lidars([buttons[0]], [], buttons)))
    assert obstacles.shape == (layout.objects, 2) == (32, 2)
    away = np.linalg.norm(obstacles - np.array(buttons)[:, None], axis=-1).min(-1)
    assert away[0] > 0.5
    assert away[1] < 1e-3


def test_motion_follows_from_compass_and_speed() -> None:
    """On a circle of radius 2 at 1 m/s, with the heading along it and a field that points east."""
    layout, seconds = layout_with("hazards"), 0.1
    times = seconds * np.arange(6)
    vector = np.zeros((6, 71), np.float32)
    heading = np.pi - 0.2 + times / 2  # crosses +-pi
    vector[:, 0] = 1.0
    vector[:, 4], vector[:, 5] = np.cos(heading), -np.sin(heading)
    displacement, turn = layout.motion(jnp.asarray(vector))
    np.testing.assert_allclose(turn, 0.05, atol=1e-6)
    chord = 2 * 2 * np.sin(0.025)
    np.testing.assert_allclose(displacement[:, 0], chord * np.cos(0.025), rtol=1e-3)
    np.testing.assert_allclose(displacement[:, 1], chord * np.sin(0.025), rtol=1e-2)
