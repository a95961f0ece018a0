"""Where we deviate on purpose: the published choices, to be fed to our planner in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def padded_elites(objective: jax.Array, cost: jax.Array, safe: jax.Array, count: int) -> jax.Array:
    """The elites of a list of safe candidates that is filled up to full length with candidate 0."""
    listed = jnp.nonzero(safe, size=safe.size, fill_value=0)[0]
    best = listed[jax.lax.top_k(objective[listed], count)[1]]
    return jnp.where(safe.sum() >= count, best, cheapest_first(objective, cost, safe, count))


def cheapest_first(objective: jax.Array, cost: jax.Array, safe: jax.Array, count: int) -> jax.Array:
    """The lowest costs, of equal ones the first: what a strict test against a limit of 0 comes to."""
    return jax.lax.top_k(-cost, count)[1]
