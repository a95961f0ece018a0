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


class Anchor(NamedTuple):
    """Hazards that stay where they were observed, seen from imagined states (**ours**).

    Hazards do not move, and where they are is known exactly at the start: only the robot's motion has to be
    predicted, four numbers instead of two per hazard. At the start itself all of it is exact.
    """

    hazards: Slice
    rotation: Slice  # first row (cos, -sin) of the robot's rotation matrix
    position: Slice  # of the robot in the world, (x, y) in metres

    def offsets(
        self, observed: Float[Array, "*n O"], before: Float[Array, "*n O"], after: Float[Array, "*m O"]
    ) -> Float[Array, "*m objects 2"]:
        """Hazards relative to the imagined robot, in metres along the world's axes.

        With p the decoded world position, R_0 the observed rotation and h the observed egocentric hazards:
        R_0 h - (p_t - p_0).

        Args:
            observed, before: what was observed at the start, and what its latent decodes to.
            after: what imagined latents decode to.
        """
        begin, end = self.position
        moved = after[..., begin:end] - before[..., begin:end]
        seen = rotate(_pairs(observed, self.hazards), self._heading(observed)[..., None, :])
        return seen - moved[..., None, :]

    def egocentric(
        self, observed: Float[Array, "*n O"], before: Float[Array, "*n O"], after: Float[Array, "*m O"]
    ) -> Float[Array, "*m objects 2"]:
        """`offsets` in the frame of the imagined robot: R_t^T (...), R_t = R_0 turned as decoded."""
        turned = rotate(self._heading(after), _mirrored(self._heading(before)))
        now = rotate(turned, self._heading(observed))
        return rotate(self.offsets(observed, before, after), _mirrored(now)[..., None, :])

    def _heading(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n 2"]:
        """(cos, sin) of the robot's direction, of length 1."""
        begin, end = self.rotation
        heading = _mirrored(vector[..., begin:end])
        return heading * jax.lax.rsqrt(jnp.square(heading).sum(-1, keepdims=True) + 1e-6)


def _mirrored(heading: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """(cos, -sin): the opposite turn."""
    return heading * jnp.array([1.0, -1.0])


def rotate(points: Float[Array, "*n 2"], heading: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """Points turned counter-clockwise by headings (cos, sin)."""
    cos, sin = heading[..., 0], heading[..., 1]
    x, y = points[..., 0], points[..., 1]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], -1)


def anchored_hazards(anchor: Anchor, radius: float) -> CostModel:
    """Number of anchored hazards within `radius` metres of the imagined robot (**ours**)."""

    def cost(model: WorldModel, start: Start, latents: Latent) -> Float[Array, "*m"]:
        before, after = model.decode(start.latent), model.decode(latents)
        return count_within(anchor.offsets(start.vector, before, after), radius)

    return cost


Read = Callable[[Latent], Float[Array, "*m F"]]


class Features(NamedTuple):
    """What actor and critics read at a latent: `extra` numbers more than its `feat`.

    `at(model, start)` gives the function that reads, with what depends on the start alone done once.
    """

    extra: int
    at: Callable[[WorldModel, Start], Read]


LATENT = Features(0, lambda model, start: lambda latents: latents.feat)

_NEAREST = 4  # hazards that an actor is shown
_PROXIMITY = 0.3  # m, distance over which a hazard's proximity decays


def nearest_hazards(anchor: Anchor) -> Features:
    """`feat` and the nearest anchored hazards: egocentric x, y (m) and exp(-distance / 0.3 m) of each.

    **Ours.** A small latent blurs positions by about a hazard's radius; here an actor knows them exactly
    where it acts, and as exactly as the predicted motion where it imagines. Sorted by distance, the numbers
    do not depend on the order in which an environment lists its hazards.
    """

    def at(model: WorldModel, start: Start) -> Read:
        before = model.decode(start.latent)

        def read(latents: Latent) -> Float[Array, "*m F"]:
            ego = anchor.egocentric(start.vector, before, model.decode(latents))
            distance = jnp.sqrt(jnp.square(ego).sum(-1) + 1e-12)
            nearest = jax.lax.top_k(-distance, min(_NEAREST, ego.shape[-2]))[1]
            ego = jnp.take_along_axis(ego, nearest[..., None], -2)
            proximity = jnp.exp(-jnp.take_along_axis(distance, nearest, -1) / _PROXIMITY)
            shown = jnp.concatenate([ego, proximity[..., None]], -1)
            return jnp.concatenate([latents.feat, shown.reshape(*shown.shape[:-2], -1)], -1)

        return read

    begin, end = anchor.hazards
    return Features(3 * min(_NEAREST, (end - begin) // 2), at)


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
