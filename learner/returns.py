"""Returns and their normalisation; one set of functions for reward and cost."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def lambda_return(
    reward: Float[Array, "H *n"],
    value: Float[Array, "H *n"],
    discount: Float[Array, "H *n"],
    lambda_: float,
) -> Float[Array, "H *n"]:
    """TD(lambda) returns of states 0..H-1, from what follows them (DreamerV3, eq. 7).

    R_t = r_{t+1} + d_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),  R_H = v_H.

    Args:
        reward: r_1 .. r_H, received on arriving at states 1..H.
        value: v_1 .. v_H.
        discount: gamma * cont of states 1..H.
    """

    def step(following: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        r, v, d = inputs
        return_ = r + d * ((1 - lambda_) * v + lambda_ * following)
        return return_, return_

    _, returns = jax.lax.scan(step, value[-1], (reward, value, discount), reverse=True)
    return returns


def trajectory_weight(cont: Float[Array, "H+1 *n"], gamma: float) -> Float[Array, "H+1 *n"]:
    """Weight of imagined states: cumprod(gamma * cont) / gamma, so that weight_0 = cont_0."""
    return jnp.cumprod(gamma * cont, 0) / gamma


class Moments(NamedTuple):
    """Running 5th and 95th percentile of imagined returns."""

    low: Float[Array, ""]
    high: Float[Array, ""]

    @classmethod
    def init(cls) -> Moments:
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(self, returns: Float[Array, "..."], decay: float) -> Moments:
        """Exponential moving average of the batch percentiles (DreamerV3, eq. 12)."""
        low, high = jnp.percentile(returns, jnp.array([5.0, 95.0]))
        return Moments(decay * self.low + (1 - decay) * low, decay * self.high + (1 - decay) * high)

    @property
    def spread(self) -> Float[Array, ""]:
        return self.high - self.low

    @property
    def scale(self) -> Float[Array, ""]:
        """max(1, spread): small returns are not blown up."""
        return jnp.maximum(1.0, self.spread)
