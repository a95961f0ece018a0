from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learner.geometry import relative_motion
from learner.layers import symlog
from learner.layout import layout_of
from learner.scene import Body, Scene, SceneModel, imagine_next_goal, seen
from tests.learner.tiny import MODEL, SCENE, batch, filled

KEY = jax.random.PRNGKey(0)
LAYOUT = layout_of(SCENE)
QUARTER = np.pi / 2
ACTION = jnp.zeros(2)


class Moving:
    """A body whose motion is given: metres ahead and to the left, radians to the left."""

    layout = LAYOUT

    def __init__(self, ahead: float, left: float, turn: float):
        self._motion = jnp.array([ahead, left, turn]) / 0.1

    def __call__(self, body: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        return body + 1, self._motion


def move(motion: tuple[float, float, float], goal: Any, obstacles: Any = ((9.0, 9.0),)) -> Scene:
    body: Any = Moving(*motion)
    scene = Scene(jnp.zeros(3), jnp.array(goal), jnp.array(obstacles), jnp.array([5.0, 6.0]), jnp.zeros(()))
    return Body.move(body, scene, ACTION)


def test_a_scene_is_what_its_layout_sees() -> None:
    scene = seen(LAYOUT, jnp.arange(13.0) - 4)
    np.testing.assert_allclose(scene.body, symlog(jnp.array([-4.0, -3.0, -2.0])))
    np.testing.assert_array_equal(scene.goal, [-1, 0])
    np.testing.assert_array_equal(scene.obstacles, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(scene.next_goal, [1.5, 0])
    assert float(scene.reward) == 0.0


# --- how it moves -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("motion", "place", "expected"),
    [
        ((0.0, 0.0, 0.0), (1.0, 2.0), (1.0, 2.0)),
        ((0.5, 0.0, 0.0), (1.0, 0.0), (0.5, 0.0)),  # driving towards it
        ((0.0, 0.0, QUARTER), (1.0, 0.0), (0.0, -1.0)),  # turned left, it lies to the right
        ((1.0, 1.0, QUARTER), (1.0, 2.0), (1.0, 0.0)),  # moved, then turned towards it
    ],
)
def test_objects_pass_by_as_the_robot_moves(motion: Any, place: Any, expected: Any) -> None:
    moved = move(motion, goal=place, obstacles=[place, (1.0, 1.0)])
    np.testing.assert_allclose(moved.goal, expected, atol=1e-6)
    np.testing.assert_allclose(moved.obstacles[0], expected, atol=1e-6)
    np.testing.assert_array_equal(moved.body, 1)


def test_the_task_pays_for_metres_and_for_the_goal() -> None:
    """2 per metre, 1 for coming within 0.3 m, whereupon the next goal appears (tiny's `SceneSpec`)."""
    nearer = move((0.5, 0.0, 0.0), goal=(1.0, 0.0))
    assert float(nearer.reward) == pytest.approx(1.0)
    away = move((-0.5, 0.0, 0.0), goal=(1.0, 0.0))
    assert float(away.reward) == pytest.approx(-1.0)
    reached = move((0.75, 0.0, 0.0), goal=(1.0, 0.0))
    assert float(reached.reward) == pytest.approx(1.5 + 1.0)
    np.testing.assert_array_equal(reached.goal, [5.0, 6.0])


def test_next_goals_lie_all_around() -> None:
    scene = imagine_next_goal(seen(LAYOUT, jnp.zeros((1000, 13))), LAYOUT.task, KEY, (1000,))
    far = np.hypot(*np.asarray(scene.next_goal).T)
    assert far.min() >= 0.4 * 1.5
    assert far.max() <= 1.6 * 1.5 + 1e-5
    assert np.abs(np.asarray(scene.next_goal).mean(0)).max() < 0.15
    one = imagine_next_goal(seen(LAYOUT, jnp.zeros(13)), LAYOUT.task, KEY)
    assert one.next_goal.shape == (2,)


def test_rewards_have_gradients_towards_the_goal() -> None:
    body = filled(lambda: Body(KEY, SCENE, MODEL))
    scene = seen(LAYOUT, jnp.asarray(np.random.default_rng(1).normal(size=13), jnp.float32))

    def reward(action: jax.Array) -> jax.Array:
        return body.move(scene, action).reward

    gradient = np.asarray(jax.grad(reward)(ACTION))
    for i, step in enumerate(np.eye(2) * 1e-2):
        difference = (reward(ACTION + step) - reward(ACTION - step)) / 2e-2
        assert gradient[i] == pytest.approx(float(difference), rel=0.05, abs=1e-3)


def test_actions_are_bounded_as_the_environment_does() -> None:
    body = filled(lambda: Body(KEY, SCENE, MODEL))
    sensors = jnp.zeros(3)
    far, edge = body(sensors, jnp.array([7.0, -0.5])), body(sensors, jnp.array([1.0, -0.5]))
    np.testing.assert_allclose(far[1], edge[1], rtol=1e-5)


# --- how it is learned --------------------------------------------------------------------------


def driven(seed: int, size: int = 2, length: int = 4) -> dict[str, np.ndarray]:
    """Windows of a robot that turns by 0.3 a_1 and then drives 0.1 (1 + a_0) ahead.

    Its sensors show the last action; its goal and hazards are nowhere: motion must be learned without them.
    """
    rng = np.random.default_rng(seed)
    data = batch(seed, size, length)
    vector = np.zeros((size, length, 13), np.float32)
    for b in range(size):
        position, angle, last = rng.normal(size=2), rng.uniform(-3, 3), np.zeros(2)
        for t in range(length):
            heading = np.array([np.cos(angle), np.sin(angle)])
            vector[b, t] = [*last, 0, *np.zeros(6), heading[0], -heading[1], *position]
            last = data["action"][b, t]
            angle += 0.3 * last[1]
            position = position + 0.1 * (1 + last[0]) * np.array([np.cos(angle), np.sin(angle)])
    return data | {"vector": vector}


def test_loss_is_that_of_steps_one_after_the_other() -> None:
    """The batch has an episode's border before step 2 of its first window."""
    body, data = filled(lambda: Body(KEY, SCENE, MODEL), scale=0.05), driven(0)
    sensors = symlog(jnp.asarray(data["vector"][..., :3]))
    moved, turned = relative_motion(*(jnp.asarray(data["vector"][..., i : i + 2]) for i in (11, 9)))
    expected = np.zeros((2, 3))
    for b in range(2):
        predicted = sensors[b, 0]
        for t in range(3):
            predicted = sensors[b, t] if data["is_first"][b, t] else predicted
            predicted, motion = body(predicted, data["action"][b, t])
            target = np.array([*moved[b, t], turned[b, t]]) / 0.1
            error = np.square(predicted - sensors[b, t + 1]).sum() + np.square(motion - target).sum()
            expected[b, t] = 0.0 if data["is_first"][b, t + 1] else error
    assert (expected == 0).sum() == 1
    assert expected.max() < 100  # no error beyond the bound
    np.testing.assert_allclose(body.loss(data), expected, rtol=1e-3)


def test_a_collision_does_not_swamp_the_rest() -> None:
    body, data = filled(lambda: Body(KEY, SCENE, MODEL)), driven(0)
    data["vector"][1, 3, 11:] += 100.0  # thrown 141 m away: 1414 units, squared two millions
    assert float(body.loss(data)[1, 2]) < 2 * 10 * 2000


def test_motion_is_learned_over_whole_windows() -> None:
    cfg = dataclasses.replace(MODEL, body_units=32)
    body, data = jax.jit(lambda: Body(KEY, SCENE, cfg))(), driven(1, 64, 6)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def fit(body: Body) -> tuple[Body, jax.Array]:
        def step(carry: tuple, _: Any) -> tuple[tuple, jax.Array]:
            body, state = carry
            loss, grads = jax.value_and_grad(lambda body: body.loss(data).mean())(body)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(body, updates), state), loss

        (body, _), losses = jax.lax.scan(step, (body, optimizer.init(body)), None, 800)  # pyright: ignore
        return body, losses

    trained, losses = fit(body)
    assert losses[-1] < losses[0] / 100
    test = driven(2, 16, 6)
    assert np.sqrt(np.asarray(trained.loss(test)).mean()) < 0.5  # of 0.1 m, 0.1 rad and the sensors, in all


# --- without a latent ---------------------------------------------------------------------------


def test_a_scene_model_learns_motion_alone() -> None:
    model, data = filled(lambda: SceneModel(KEY, SCENE, MODEL)), driven(0)
    loss, (observed, metrics) = model.loss(data, KEY)
    assert float(loss) == pytest.approx(float(model.body.loss(data).mean()))
    assert metrics == {"loss/motion": loss}
    assert observed.latents.feat.shape == (2, 4, 0)
    start = model.initial(3)
    for step in (model.filter, model.imagine):
        go: Callable = step
        arguments = (ACTION,) if step == model.imagine else (ACTION, jnp.zeros(3, bool), {})
        assert go(start, *arguments, model.noise(KEY, 3)).feat.shape == (3, 0)
    np.testing.assert_array_equal(model.cont(start).mode, 1.0)
