"""Where imagined costs come from: a learned head, decoded hazards, or hazards seen at the start.

A cost model maps (model, start, latents) to the predicted cost of arriving at each latent. `latents` have
any leading axes that broadcast against those of `start`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from learner.rssm import Latent
from learner.world_model import WorldModel

_BORDER_SOFTNESS = 0.05  # m, width of the border through which a hazard count passes gradients

Slice = tuple[int, int]  # (start, stop) in the state observation, from `EnvSpec.slices`


class Start(NamedTuple):
    """A state from which futures are imagined: its posterior, and what was really observed there."""

    latent: Latent  # [*n, ...]
    vector: Float[Array, "*n O"]


CostModel = Callable[[WorldModel, Start, Latent], Float[Array, "*m"]]


def learned_cost(model: WorldModel, start: Start, latents: Latent) -> Float[Array, "*m"]:
    """The mean of the cost head (SafeDreamer, all methods but OSRP-Vector)."""
    return model.cost(latents).mean


def decoded_hazards(hazards: Slice, radius: float) -> CostModel:
    """Number of hazards within `radius` metres in the decoded observation (OSRP-Vector)."""

    def cost(model: WorldModel, start: Start, latents: Latent) -> Float[Array, "*m"]:
        return count_within(_pairs(model.decode(latents), hazards), radius)

    return cost


def anchored_hazards(hazards: Slice, rotation: Slice, position: Slice, radius: float) -> CostModel:
    """Number of hazards within `radius` metres of the imagined path, hazards as observed at its start.

    **Ours.** Hazards do not move, and where they are is known exactly at the start: only the robot's
    displacement has to be predicted, two numbers instead of two per hazard. With p the decoded world
    position, R_0 the observed rotation and h the observed egocentric hazards,

        distance_t = | R_0 h - (p_t - p_0) |.

    Args:
        rotation: slice of the first row (cos, -sin) of the robot's rotation matrix.
        position: slice of the robot's world position (x, y), in metres.
    """

    def cost(model: WorldModel, start: Start, latents: Latent) -> Float[Array, "*m"]:
        cos, minus_sin = (start.vector[..., rotation[0] + i, None] for i in (0, 1))
        ego = _pairs(start.vector, hazards)
        x, y = ego[..., 0], ego[..., 1]
        seen = jnp.stack([cos * x + minus_sin * y, cos * y - minus_sin * x], -1)
        begin, end = position
        moved = model.decode(latents)[..., begin:end] - model.decode(start.latent)[..., begin:end]
        return count_within(seen - moved[..., None, :], radius)

    return cost


def count_within(offsets: Float[Array, "*n objects 2"], radius: float) -> Float[Array, "*n"]:
    """Number of objects within `radius` metres.

    The count is exact; its gradient is that of a sigmoid of the distance to the border (**ours**: a count
    has none, and an actor that is trained through the model needs one).
    """
    distance = jnp.sqrt(jnp.square(offsets).sum(-1) + 1e-12)
    soft = jax.nn.sigmoid((radius - distance) / _BORDER_SOFTNESS)
    return (soft + jax.lax.stop_gradient((distance <= radius) - soft)).sum(-1)


def _pairs(vector: Float[Array, "*n O"], objects: Slice) -> Float[Array, "*n objects 2"]:
    start, stop = objects
    return vector[..., start:stop].reshape(*vector.shape[:-1], -1, 2)
