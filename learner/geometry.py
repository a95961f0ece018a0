"""Plane geometry on arrays: headings are unit vectors (cos, sin)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BORDER_SOFTNESS = 0.05  # m, width of the border through which `within` passes gradients


def rotate(points: Float[Array, "*n 2"], heading: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """Points turned counter-clockwise by headings; also composes two headings."""
    cos, sin = heading[..., 0], heading[..., 1]
    x, y = points[..., 0], points[..., 1]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], -1)


def opposite(heading: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """(cos, -sin): the turn back."""
    return heading * jnp.array([1.0, -1.0])


def heading_of(angle: Float[Array, "*n"]) -> Float[Array, "*n 2"]:
    """The heading of an angle in radians."""
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)


def distance(offsets: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
    """Metres to each; the root's gradient stays finite at 0."""
    return jnp.sqrt(jnp.square(offsets).sum(-1) + 1e-12)


def within(offsets: Float[Array, "*n 2"], radius: float) -> Float[Array, "*n"]:
    """1 within `radius` metres, else 0.

    The value is exact; its gradient is that of a sigmoid of the distance to the border (**ours**: a step has
    none, and an actor that is trained through the model needs one).
    """
    distances = distance(offsets)
    soft = jax.nn.sigmoid((radius - distances) / _BORDER_SOFTNESS)
    return soft + jax.lax.stop_gradient((distances <= radius) - soft)


def relative_motion(
    position: Float[Array, "*n T 2"], rotation_row: Float[Array, "*n T 2"]
) -> tuple[Float[Array, "*n T-1 2"], Float[Array, "*n T-1"]]:
    """How a robot moved between consecutive steps, as it saw it itself.

    Args:
        position: in the world, metres.
        rotation_row: first row (cos, -sin) of the robot's rotation matrix.

    Returns:
        Displacement in the frame of the earlier step (m), and the angle turned (rad, in +-pi).
    """
    heading = opposite(rotation_row)
    heading = heading * jax.lax.rsqrt(jnp.square(heading).sum(-1, keepdims=True) + 1e-6)
    back = opposite(heading[..., :-1, :])
    displacement = rotate(position[..., 1:, :] - position[..., :-1, :], back)
    turned = rotate(heading[..., 1:, :], back)
    return displacement, jnp.arctan2(turned[..., 1], turned[..., 0])
