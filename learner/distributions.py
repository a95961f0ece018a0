"""The four distributions of DreamerV3: one-hot, two-hot, Bernoulli, bounded normal.

Each is a NamedTuple of its parameters, so that it passes through jit, scan and vmap.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from learner.layers import symexp, symlog

_MIN_STD, _MAX_STD, _STD_OFFSET = 0.1, 1.0, 2.0


def uniform_mix(logits: Float[Array, "*n K"], mix: float) -> Float[Array, "*n K"]:
    """Probabilities (1 - mix) softmax(logits) + mix / K (DreamerV3, section "world model")."""
    return (1 - mix) * jax.nn.softmax(logits) + mix / logits.shape[-1]


@jax.custom_jvp
def straight_through(hard: Float[Array, "*n"], soft: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Exactly `hard`, with the gradient of `soft`, which is not even computed where none is asked for."""
    return hard


@straight_through.defjvp
def _straight_through_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


class OneHot(NamedTuple):
    """Categoricals over the last axis, drawn as one-hot vectors with straight-through gradients."""

    probs: Float[Array, "*n S K"]  # positive, as `uniform_mix` gives them

    @property
    def logits(self) -> Float[Array, "*n S K"]:
        """Log-probabilities."""
        return jnp.log(self.probs)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*n S K"]:
        return self.sample_with(jax.random.uniform(key, self.probs.shape[:-1]))

    def sample_with(self, uniform: Float[Array, "*n S"] | None) -> Float[Array, "*n S K"]:
        """Draws with given uniform noise in [0, 1), so that a scan need not split keys; None: the mode.

        By the inverse of the cumulative distribution: one random number per categorical, not K.
        """
        drawn = jax.nn.one_hot(self.classes_with(uniform), self.probs.shape[-1])
        return straight_through(drawn, self.probs)

    def classes_with(self, uniform: Float[Array, "*n S"] | None) -> Int[Array, "*n S"]:
        """The classes that `sample_with` draws."""
        if uniform is None:
            return jnp.argmax(self.probs, -1)
        below = jnp.cumsum(self.probs, -1) <= uniform[..., None]
        # Rounding may leave the sum of all probabilities a little below 1.
        return jnp.minimum(below.sum(-1), self.probs.shape[-1] - 1)

    def mode(self) -> Float[Array, "*n S K"]:
        """The likeliest classes as one-hot vectors, without a gradient."""
        return jax.nn.one_hot(self.classes_with(None), self.probs.shape[-1])

    def entropy(self) -> Float[Array, "*n"]:
        """Nats, summed over the S categoricals."""
        return -(self.probs * self.logits).sum((-2, -1))

    def kl(self, other: OneHot) -> Float[Array, "*n"]:
        """KL(self || other) in nats, summed over the S categoricals."""
        return (self.probs * (self.logits - other.logits)).sum((-2, -1))


class TwoHot(NamedTuple):
    """A scalar as a categorical over bins that are evenly spaced in symlog space (DreamerV3, eq. 9-10)."""

    logits: Float[Array, "*n bins"]
    bins: Float[Array, " bins"]

    @property
    def mean(self) -> Float[Array, "*n"]:
        """symexp(sum p bin)."""
        return symexp((jax.nn.softmax(self.logits) * self.bins).sum(-1))

    def log_prob(self, x: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Negative cross-entropy to the two-hot encoding of x, in nats."""
        target = two_hot(symlog(x), self.bins)
        return (target * jax.nn.log_softmax(self.logits)).sum(-1)


def two_hot(x: Float[Array, "*n"], bins: Float[Array, " bins"]) -> Float[Array, "*n bins"]:
    """Weights of the two bins around x whose mean is x; values outside go to the outermost bin.

    Hand check: bins (-1, 0, 1), x = 0.25 -> (0, 0.75, 0.25).
    """
    spacing = bins[1] - bins[0]
    # A triangle of one spacing to either side of x, seen from every bin, is the two-hot weight.
    return jnp.maximum(0.0, 1.0 - jnp.abs(jnp.clip(x, bins[0], bins[-1])[..., None] - bins) / spacing)


class Bernoulli(NamedTuple):
    logit: Float[Array, "*n"]

    @property
    def mode(self) -> Float[Array, "*n"]:
        """1.0 where the probability exceeds one half."""
        return (self.logit > 0).astype(jnp.float32)

    def log_prob(self, x: Float[Array, "*n"] | Bool[Array, "*n"]) -> Float[Array, "*n"]:
        return x * jax.nn.log_sigmoid(self.logit) + (1 - x) * jax.nn.log_sigmoid(-self.logit)


class BoundedNormal(NamedTuple):
    """Normal(tanh(raw_mean), std) with std between 0.1 and 1; samples are not bounded themselves."""

    mean: Float[Array, "*n A"]
    std: Float[Array, "*n A"]

    @classmethod
    def from_raw(cls, mean: Float[Array, "*n A"], std: Float[Array, "*n A"]) -> BoundedNormal:
        """std = 0.9 sigmoid(s + 2) + 0.1."""
        return cls(jnp.tanh(mean), (_MAX_STD - _MIN_STD) * jax.nn.sigmoid(std + _STD_OFFSET) + _MIN_STD)

    def sample_with(self, noise: Float[Array, "*n A"]) -> Float[Array, "*n A"]:
        """Reparametrised draw with given standard normal noise."""
        return self.mean + self.std * noise

    def entropy(self) -> Float[Array, "*n"]:
        """Nats, summed over action dimensions."""
        return (0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(self.std)).sum(-1)
