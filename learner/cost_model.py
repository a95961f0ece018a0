"""Where imagined costs come from: a learned head, decoded hazards, or hazards that were really seen.

A cost model maps (model, imagined state) to the predicted cost of arriving there. Features say what actor and
critics read of such a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.types import VECTOR
from learner.codec import Obs
from learner.geometry import opposite, rotate
from learner.rssm import Latent
from learner.world_model import WorldModel

_BORDER_SOFTNESS = 0.05  # m, width of the border through which a hazard count passes gradients

Slice = tuple[int, int]  # (start, stop) in the state observation, from `EnvSpec.slices`


class State(NamedTuple):
    """An imagined (or real) state: its latent, and the hazards around the robot.

    `hazards` are egocentric (x, y) in metres: as observed where imagination starts, then carried along by
    the robot's predicted motion. None for methods that do not track hazards.
    """

    latent: Latent  # [*n, ...]
    hazards: Float[Array, "*n objects 2"] | None


Look = Callable[[Obs], Float[Array, "*n objects 2"] | None]  # observation -> hazards
CostModel = Callable[[WorldModel, State], Float[Array, "*n"]]


def look_away(obs: Obs) -> None:
    """No hazards: for methods that do not track them."""


def look_at(hazards: Slice) -> Look:
    """Reads egocentric positions out of a state observation."""
    return lambda obs: _pairs(obs[VECTOR], hazards)


def move(
    model: WorldModel, hazards: Float[Array, "*n objects 2"] | None, latent: Latent
) -> Float[Array, "*n objects 2"] | None:
    """Hazards as the robot sees them after its predicted motion into `latent` (**ours**).

    Hazards do not move, and where they are is known exactly at the start of imagination: only the robot's
    motion has to be predicted, three numbers instead of two per hazard. h' = R(turn)^T (h - displacement).
    """
    if hazards is None:
        return None
    displacement, heading = model.motion(latent)
    return rotate(hazards - displacement[..., None, :], opposite(heading)[..., None, :])


def free_of_cost(model: WorldModel, state: State) -> Float[Array, "*n"]:
    """No cost anywhere: an unconstrained planner finds every plan safe (CEM)."""
    return jnp.zeros(state.latent.deter.shape[:-1])


def learned_cost(model: WorldModel, state: State) -> Float[Array, "*n"]:
    """The mean of the cost head (SafeDreamer, all methods but OSRP-Vector)."""
    return model.cost(state.latent).mean


def decoded_hazards(hazards: Slice, radius: float) -> CostModel:
    """Number of hazards within `radius` metres in the decoded observation (OSRP-Vector)."""
    return lambda model, state: count_within(_pairs(model.decode_vector(state.latent), hazards), radius)


def tracked_hazards(radius: float) -> CostModel:
    """Number of tracked hazards within `radius` metres (**ours**, see `move`)."""
    return lambda model, state: count_within(_tracked(state), radius)


def count_within(offsets: Float[Array, "*n objects 2"], radius: float) -> Float[Array, "*n"]:
    """Number of objects within `radius` metres.

    The count is exact; its gradient is that of a sigmoid of the distance to the border (**ours**: a count
    has none, and an actor that is trained through the model needs one).
    """
    distance = _distance(offsets)
    soft = jax.nn.sigmoid((radius - distance) / _BORDER_SOFTNESS)
    return (soft + jax.lax.stop_gradient((distance <= radius) - soft)).sum(-1)


class Features(NamedTuple):
    """What actor and critics read of a state: `extra` numbers more than the latent's `feat`."""

    extra: int
    read: Callable[[State], Float[Array, "*n F"]]


LATENT = Features(0, lambda state: state.latent.feat)

_NEAREST = 4  # hazards that an actor is shown
_PROXIMITY = 0.3  # m, distance over which a hazard's proximity decays


def nearest_hazards(objects: int) -> Features:
    """`feat` and the nearest tracked hazards: egocentric x, y (m) and exp(-distance / 0.3 m) of each.

    **Ours.** A small latent blurs positions by more than a hazard's radius; here an actor knows them exactly
    where it acts, and as exactly as the predicted motion where it imagines. Sorted by distance, the numbers
    do not depend on the order in which an environment lists its hazards.

    Args:
        objects: hazards in the task.
    """
    shown = min(_NEAREST, objects)

    def read(state: State) -> Float[Array, "*n F"]:
        hazards = _tracked(state)
        distance = _distance(hazards)
        nearest = jax.lax.top_k(-distance, shown)[1]
        position = jnp.take_along_axis(hazards, nearest[..., None], -2)
        proximity = jnp.exp(-_distance(position) / _PROXIMITY)
        numbers = jnp.concatenate([position, proximity[..., None]], -1)
        return jnp.concatenate([state.latent.feat, numbers.reshape(*numbers.shape[:-2], -1)], -1)

    return Features(3 * shown, read)


def _tracked(state: State) -> Float[Array, "*n objects 2"]:
    if state.hazards is None:
        raise TypeError("this state carries no hazards; see `look_at`")
    return state.hazards


def _distance(offsets: Float[Array, "*n objects 2"]) -> Float[Array, "*n objects"]:
    return jnp.sqrt(jnp.square(offsets).sum(-1) + 1e-12)  # the root's gradient must stay finite at 0


def _pairs(vector: Float[Array, "*n O"], objects: Slice) -> Float[Array, "*n objects 2"]:
    start, stop = objects
    return vector[..., start:stop].reshape(*vector.shape[:-1], -1, 2)
