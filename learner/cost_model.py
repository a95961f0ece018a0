"""Where imagined rewards and costs come from: learned heads, decoded hazards, or the tracked scene.

A reward or cost model maps (model, imagined state) to what is predicted for arriving there. Features say what
actor and critics read of such a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from common.types import VECTOR
from learner.codec import Obs
from learner.geometry import distance, within
from learner.layers import join
from learner.layout import Layout
from learner.rssm import Latent
from learner.scene import Scene, imagine_next_goal, seen
from learner.world_model import Model, WorldModel

Slice = tuple[int, int]  # (start, stop) in the state observation, from `EnvSpec.slices`


class State(NamedTuple):
    """An imagined (or real) state: its latent, and the scene around the robot where a method tracks it."""

    latent: Latent  # [*n, ...]
    scene: Scene | None


Look = Callable[[Obs], Scene | None]  # observation -> scene
SignalModel = Callable[[Any, State], Float[Array, "*n"]]  # (world model, state) -> reward or cost


def look_away(obs: Obs) -> None:
    """No scene: for methods that do not track one."""


def look_at(layout: Layout) -> Look:
    """Reads the scene out of a state observation."""
    return lambda obs: seen(layout, obs[VECTOR])


def start_of(model: Model, state: State, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> State:
    """A state from which to imagine: its next goal is drawn at random, one for each of `shape`."""
    if state.scene is None or model.body is None:
        return state
    return state._replace(scene=imagine_next_goal(state.scene, model.body.layout.task, key, shape))


def follow(
    model: Model, state: State, action: Float[Array, "*n A"], uniform: Float[Array, "*n S"] | None
) -> State:
    """The next imagined state: a draw from the prior (its mode without `uniform`), the scene moved along."""
    latent = model.imagine(state.latent, action, uniform)
    if state.scene is None:
        return State(latent, None)
    if model.body is None:
        raise TypeError("this world model learns no motion; see SafetyConfig.cost_model tracked")
    return State(latent, model.body.move(state.scene, action))


# --- rewards and costs --------------------------------------------------------------------------


def learned_reward(model: WorldModel, state: State) -> Float[Array, "*n"]:
    """The mean of the reward head (SafeDreamer)."""
    return model.reward(state.latent).mean


def tracked_reward(model: Model, state: State) -> Float[Array, "*n"]:
    """What the task pays for the tracked motion towards the goal (**ours**, see `learner.scene`)."""
    return _tracked(state).reward


def free_of_cost(model: Model, state: State) -> Float[Array, "*n"]:
    """No cost anywhere: an unconstrained planner finds every plan safe (CEM)."""
    return jnp.zeros(state.latent.deter.shape[:-1])


def learned_cost(model: WorldModel, state: State) -> Float[Array, "*n"]:
    """The mean of the cost head (SafeDreamer, all methods but OSRP-Vector)."""
    return model.cost(state.latent).mean


def decoded_hazards(hazards: Slice, radius: float) -> SignalModel:
    """Number of hazards within `radius` metres in the decoded observation (OSRP-Vector)."""
    start, stop = hazards

    def count(model: WorldModel, state: State) -> Float[Array, "*n"]:
        positions = model.decode_vector(state.latent)[..., start:stop]
        return count_within(positions.reshape(*positions.shape[:-1], -1, 2), radius)

    return count


def tracked_obstacles(radius: float) -> SignalModel:
    """Number of tracked obstacles within `radius` metres (**ours**, see `learner.scene`)."""
    return lambda model, state: count_within(_tracked(state).obstacles, radius)


def count_within(offsets: Float[Array, "*n objects 2"], radius: float) -> Float[Array, "*n"]:
    """Number of objects within `radius` metres, with the gradient of `within`."""
    return within(offsets, radius).sum(-1)


# --- features -----------------------------------------------------------------------------------


class Features(NamedTuple):
    """What actor and critics read of a state: `extra` numbers more than the latent's `feat`."""

    extra: int
    read: Callable[[State], Any]  # [*n, F]


LATENT = Features(0, lambda state: state.latent.feat)

_PROXIMITY = 0.3  # m, distance over which a proximity decays


def scene_features(layout: Layout) -> Features:
    """`feat` and the scene: sensors, goal and the nearest obstacles.

    **Ours.** A small latent blurs positions by more than a hazard's radius; here an actor knows them exactly
    where it acts, and as exactly as the predicted motion where it imagines. Each object is egocentric x, y
    (m) and exp(-distance / 0.3 m), the goal also its distance and direction. Sorted by distance, the numbers
    do not depend on the order in which an environment lists its obstacles.
    """
    shown = layout.shown
    sensors = sum(stop - start for start, stop in layout.sensors)

    def read(state: State) -> Any:
        scene = _tracked(state)
        obstacles = scene.obstacles
        if shown:
            nearest = jax.lax.top_k(-distance(obstacles), shown)[1]
            obstacles = jnp.take_along_axis(obstacles, nearest[..., None], -2)
        obstacles = _positions(obstacles)
        far = distance(scene.goal)[..., None]
        parts = [
            state.latent.feat,
            scene.body,
            _positions(scene.goal),
            far,
            scene.goal / (far + 1e-3),
            obstacles.reshape(*obstacles.shape[:-2], -1),
            jnp.ones_like(far),  # keeps the size of all these through the first LayerNorm
        ]
        return join(*parts)

    return Features(sensors + 3 + 3 + 3 * shown + 1, read)


def _positions(offsets: Float[Array, "*n 2"]) -> Float[Array, "*n 3"]:
    return jnp.concatenate([offsets, jnp.exp(-distance(offsets) / _PROXIMITY)[..., None]], -1)


def _tracked(state: State) -> Scene:
    if state.scene is None:
        raise TypeError("this state carries no scene; see `look_at`")
    return state.scene
