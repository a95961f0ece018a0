"""Recurrent state-space model: a GRU with a categorical stochastic state (DreamerV3).

Posterior rollouts hoist out of the scan whatever does not depend on the recurrence: the embedding's
projection before it, the prior's logits after it. Prior and posterior are equal to the step-by-step form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from common.config import WorldModelConfig
from learner.distributions import OneHot, uniform_mix
from learner.layers import Classes, Dense, LayerNorm, Linear, join

# On a CPU, a decision of OSRP-Vector takes a tenth less time for gathering 16 classes (`paper`), and half as
# much again for gathering 8 (`nano`).
_GATHERED_CLASSES = 16


class Latent(NamedTuple):
    """State of the model: deterministic recurrent part and sampled one-hot part."""

    deter: Float[Array, "*n D"]
    stoch: Any  # [*n, S, K], or `Classes` for the same without gradients

    @property
    def feat(self) -> Any:
        """concat(deter, stoch) [*n, D+S*K], what every head reads."""
        return join(self.deter, self.flat)

    @property
    def flat(self) -> Any:
        """The one-hot part as a layer reads it, [*n, S*K]."""
        stoch = self.stoch
        return stoch if isinstance(stoch, Classes) else stoch.reshape(*stoch.shape[:-2], -1)

    def by_classes(self) -> Latent:
        """The same latent, to imagine from without gradients: layers gather where they would multiply.

        That pays from about 16 classes on; with fewer the latent stays as it is.
        """
        if isinstance(self.stoch, Classes) or self.stoch.shape[-1] < _GATHERED_CLASSES:
            return self
        return Latent(self.deter, Classes(jnp.argmax(self.stoch, -1), self.stoch.shape[-1]))


class RSSM(eqx.Module):
    """Prior p(stoch | deter), posterior q(stoch | deter, embed), recurrence deter' = f(latent, action)."""

    initial_deter: Float[Array, " D"]
    input_layer: Dense
    gru: Linear
    gru_norm: LayerNorm
    prior_layer: Dense
    prior_logits: Linear
    post_deter: Linear  # the posterior's first layer, split by input so that the
    post_embed: Linear  # embedding's share is one matmul for the whole sequence
    post_norm: LayerNorm
    post_logits: Linear
    stoch: int = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    unimix: float = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, cfg: WorldModelConfig, action_size: int, embed_size: int):
        keys = jax.random.split(key, 6)
        flat = cfg.stoch * cfg.classes
        self.stoch, self.classes, self.unimix = cfg.stoch, cfg.classes, cfg.unimix
        self.initial_deter = jnp.zeros(cfg.deter)
        self.input_layer = Dense(keys[0], flat + action_size, cfg.units)
        self.gru = Linear(keys[1], cfg.deter + cfg.units, 3 * cfg.deter, bias=False)
        self.gru_norm = LayerNorm(3 * cfg.deter)
        self.prior_layer = Dense(keys[2], cfg.deter, cfg.units)
        self.prior_logits = Linear(keys[3], cfg.units, flat)
        post = Linear(keys[4], cfg.deter + embed_size, cfg.units, bias=False)
        self.post_deter = eqx.tree_at(lambda m: m.weight, post, post.weight[: cfg.deter])
        self.post_embed = eqx.tree_at(lambda m: m.weight, post, post.weight[cfg.deter :])
        self.post_norm = LayerNorm(cfg.units)
        self.post_logits = Linear(keys[5], cfg.units, flat)

    def initial(self, *batch: int) -> Latent:
        """Learned initial state: deter = tanh(w), stoch = mode of the prior there."""
        deter = jnp.tanh(self.initial_deter)
        stoch = self.prior(deter).mode()
        latent = Latent(deter, stoch)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), latent)

    def prior(self, deter: Float[Array, "*n D"]) -> OneHot:
        return self._one_hot(self.prior_logits(self.prior_layer(deter)))

    def recur(self, latent: Latent, action: Float[Array, "*n A"]) -> Float[Array, "*n D"]:
        """Next deterministic state. LayerNorm-GRU with update bias -1 (DreamerV2, appendix)."""
        # A rescale with constant factor: out-of-range actions keep their gradient's direction.
        action = action * jax.lax.stop_gradient(1.0 / jnp.maximum(1.0, jnp.abs(action)))
        x = self.input_layer(join(latent.flat, action))
        gates = self.gru_norm(self.gru(jnp.concatenate([latent.deter, x], -1)))
        reset, candidate, update = jnp.split(gates, 3, -1)
        candidate = jnp.tanh(jax.nn.sigmoid(reset) * candidate)
        update = jax.nn.sigmoid(update - 1.0)
        return update * candidate + (1.0 - update) * latent.deter

    def img_step(
        self, latent: Latent, action: Float[Array, "*n A"], uniform: Float[Array, "*n S"] | None
    ) -> Latent:
        """Imagines one step: recurrence, then a draw from the prior by uniform noise (None: its mode)."""
        deter = self.recur(latent, action)
        prior = self.prior(deter)
        if isinstance(latent.stoch, Classes):
            return Latent(deter, Classes(prior.classes_with(uniform), self.classes))
        return Latent(deter, prior.sample_with(uniform))

    def obs_step(
        self,
        latent: Latent,
        action: Float[Array, "*n A"],
        is_first: Bool[Array, "*n"],
        embed: Float[Array, "*n E"],
        uniform: Float[Array, "*n S"] | None,
    ) -> Latent:
        """Filters one step: `action` was taken in `latent` and led to the observation in `embed`."""
        post, _ = self._filter(latent, action, is_first, self.post_embed(embed), uniform)
        return post

    def observe(
        self,
        embed: Float[Array, "B T E"],
        action: Float[Array, "B T A"],
        is_first: Bool[Array, "B T"],
        key: PRNGKeyArray,
    ) -> tuple[Latent, OneHot, OneHot]:
        """Filters whole windows from the initial state.

        Args:
            action: `action[:, t]` was chosen at `embed[:, t]`; the model consumes it at t + 1.

        Returns:
            Posterior latents [B, T, ...], posterior and prior distributions [B, T, S, K].
        """
        batch, time = is_first.shape
        uniform = jax.random.uniform(key, (time, batch, self.stoch))
        previous = jnp.concatenate([jnp.zeros_like(action[:, :1]), action[:, :-1]], 1)

        def step(latent: Latent, inputs: tuple) -> tuple[Latent, tuple[Latent, Array]]:
            post, probs = self._filter(latent, *inputs)
            return post, (post, probs)

        inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (previous, is_first, self.post_embed(embed)))
        _, (latents, probs) = jax.lax.scan(step, self.initial(batch), (*inputs, uniform))
        latents, probs = jax.tree.map(lambda x: x.swapaxes(0, 1), (latents, probs))
        return latents, OneHot(probs), self.prior(latents.deter)

    def _filter(
        self, latent: Latent, action: Array, is_first: Array, projected: Array, uniform: Array | None
    ) -> tuple[Latent, Array]:
        first = is_first[..., None]
        initial = self.initial()
        deter = jnp.where(first, initial.deter, latent.deter)
        stoch = jnp.where(first[..., None], initial.stoch, latent.stoch)
        deter = self.recur(Latent(deter, stoch), jnp.where(first, 0.0, action))
        x = jax.nn.silu(self.post_norm(self.post_deter(deter) + projected))
        post = self._one_hot(self.post_logits(x))
        return Latent(deter, post.sample_with(uniform)), post.probs

    def _one_hot(self, logits: Float[Array, "*n S*K"]) -> OneHot:
        logits = logits.reshape(*logits.shape[:-1], self.stoch, self.classes)
        return OneHot(uniform_mix(logits, self.unimix))
