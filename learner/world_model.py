"""World model: encoder, RSSM, decoder and heads, with the loss that trains them (ALGORITHM: section 1)."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from common.config import WorldModelConfig
from common.types import VECTOR, Batch, EnvSpec
from learner.codec import Decoder, Encoder, Obs, stack_images
from learner.distributions import Bernoulli, OneHot, TwoHot
from learner.layers import Head, symexp, symlog
from learner.rssm import RSSM, Latent
from learner.scene import Body, SceneModel

# Parts of a coordinate observation that say where things are; the others are the robot's own sensors.
_GEOMETRY = ("goal", "hazards", "vases", "position", "rotation")


class Observed(NamedTuple):
    """What filtering a batch gives to whoever continues from it."""

    latents: Latent  # posterior [B, T, ...]
    posterior: OneHot  # [B, T, S, K]
    prior: OneHot  # [B, T, S, K]


class WorldModel(eqx.Module):
    """Predicts observations, rewards, costs and continuation from latents.

    `cost_head` is None when costs are not learned (unsafe methods, geometric cost).
    """

    encoder: Encoder
    rssm: RSSM
    decoder: Decoder
    reward_head: Head
    cost_head: Head | None
    cont_head: Head
    body: Body | None
    cfg: WorldModelConfig = eqx.field(static=True)
    obs_keys: tuple[str, ...] = eqx.field(static=True)
    geometry: tuple[tuple[int, int], ...] = eqx.field(static=True)  # slices of positions in the vector

    def __init__(
        self,
        key: PRNGKeyArray,
        spec: EnvSpec,
        cfg: WorldModelConfig,
        *,
        learn_cost: bool,
        learn_motion: bool = False,
    ):
        keys = jax.random.split(key, 7)
        feat = cfg.deter + cfg.stoch * cfg.classes
        self.cfg = cfg
        self.geometry = tuple(spec.slices[name] for name in _GEOMETRY if name in spec.slices)
        self.obs_keys = tuple(spec.obs)
        self.encoder = Encoder(keys[0], spec, cfg)
        self.rssm = RSSM(keys[1], cfg, spec.action_size, self.encoder.size)
        self.decoder = Decoder(keys[2], spec, cfg, feat)
        self.reward_head = Head(keys[3], feat, cfg.units, cfg.head_layers, cfg.bins, outscale=0.0)
        self.cost_head = Head(keys[4], feat, cfg.units, cfg.head_layers, cfg.bins) if learn_cost else None
        self.cont_head = Head(keys[5], feat, cfg.units, cfg.head_layers, 1)
        self.body = Body(keys[6], spec, cfg) if learn_motion else None

    def encode(self, obs: Obs) -> Float[Array, "*n E"]:
        return self.encoder(obs)

    def initial(self, *batch: int) -> Latent:
        """The state before anything was seen."""
        return self.rssm.initial(*batch)

    def noise(self, key: PRNGKeyArray, *batch: int) -> Float[Array, "*batch S"]:
        """What `filter` and `imagine` draw latents with."""
        return jax.random.uniform(key, (*batch, self.rssm.stoch))

    def filter(
        self,
        latent: Latent,
        action: Float[Array, "*n A"],
        is_first: Bool[Array, "*n"],
        obs: Obs,
        uniform: Float[Array, "*n S"] | None,
    ) -> Latent:
        """The posterior after `action` in `latent` led to `obs`; its mode without `uniform`."""
        return self.rssm.obs_step(latent, action, is_first, self.encode(obs), uniform)

    def imagine(
        self, latent: Latent, action: Float[Array, "*n A"], uniform: Float[Array, "*n S"] | None
    ) -> Latent:
        """The prior after `action` in `latent`; its mode without `uniform`."""
        return self.rssm.img_step(latent, action, uniform)

    def decode_vector(self, latent: Latent) -> Float[Array, "*n O"]:
        """Predicted state observation, in the environment's units."""
        if self.decoder.vector is None:
            raise TypeError("this world model observes images alone")
        x = self.decoder.vector(latent.feat)
        return symexp(x) if self.cfg.decoder_space == "symlog" else x

    def decode_images(self, latent: Latent) -> dict[str, Float[Array, "*n h w c"]]:
        """Predicted images by their names, values around 0 to 1; none where there are no cameras."""
        if self.decoder.images is None:
            return {}
        keys = self.encoder.image_keys
        images = jnp.split(self.decoder.images(latent.feat), len(keys), -1)
        return dict(zip(keys, images, strict=True))

    def reward(self, latent: Latent) -> TwoHot:
        return TwoHot(self.reward_head(latent.feat), two_hot_bins(self.cfg))

    def cost(self, latent: Latent) -> TwoHot:
        if self.cost_head is None:
            raise TypeError("this world model learns no cost; see SafetyConfig.cost_model")
        return TwoHot(self.cost_head(latent.feat), two_hot_bins(self.cfg))

    def cont(self, latent: Latent) -> Bernoulli:
        return Bernoulli(self.cont_head(latent.feat)[..., 0])

    def observe(self, batch: Batch, key: PRNGKeyArray) -> Observed:
        """Filters a batch [B, T, ...] of replayed windows."""
        embed = self.encode({name: batch[name] for name in self.obs_keys})
        latents, posterior, prior = self.rssm.observe(embed, batch["action"], batch["is_first"], key)
        return Observed(latents, posterior, prior)

    def loss(self, batch: Batch, key: PRNGKeyArray) -> tuple[Array, tuple[Observed, dict[str, Array]]]:
        """Mean over B and T of all negative log-likelihoods and the balanced KL.

        Returns:
            The scalar loss, and (observed, metrics): each term's mean as `loss/*`, KL and entropies.
        """
        cfg = self.cfg
        observed = self.observe(batch, key)
        latents, posterior, prior = observed
        losses = {
            **self._reconstruction_losses(latents, batch),
            "reward": -self.reward(latents).log_prob(batch["reward"]),
            "cont": -self.cont(latents).log_prob(1.0 - batch["is_terminal"]),
            **kl_losses(posterior, prior, cfg),
        }
        if self.cost_head is not None:
            weight = jnp.where(batch["cost"] >= 1.0, cfg.cost_weight, 1.0)
            losses["cost"] = -weight * self.cost(latents).log_prob(batch["cost"])
        if self.body is not None:
            losses["motion"] = cfg.motion_loss_scale * self.body.loss(batch)
        metrics = {f"loss/{name}": x.mean() for name, x in losses.items()}
        metrics["model/kl"] = posterior.kl(prior).mean()
        metrics["model/prior_entropy"] = prior.entropy().mean()
        metrics["model/posterior_entropy"] = posterior.entropy().mean()
        total = sum(x.mean() for x in losses.values())
        return jnp.asarray(total), (observed, metrics)

    def _reconstruction_losses(self, latents: Latent, batch: Batch) -> dict[str, Float[Array, "B T"]]:
        """Squared errors, summed over an observation's numbers: of all images in 0..1, of the vector."""
        cfg, feat, losses = self.cfg, latents.feat, {}
        if self.decoder.images is not None:
            target = stack_images(batch, self.encoder.image_keys)
            error = jnp.square(self.decoder.images(feat) - target).sum((-3, -2, -1))
            losses["image"] = cfg.image_loss_scale * error
        if self.decoder.vector is not None:
            target = symlog(batch[VECTOR]) if cfg.decoder_space == "symlog" else batch[VECTOR]
            error = (self._weight() * jnp.square(self.decoder.vector(feat) - target)).sum(-1)
            losses["vector"] = cfg.vector_loss_scale * error
        return losses

    def _weight(self) -> Float[Array, " O"]:
        """Of every number of the vector in its loss: positions may weigh more than sensors."""
        assert self.decoder.vector is not None
        weight = jnp.ones(self.decoder.vector.out.weight.shape[1])
        for start, stop in self.geometry:
            weight = weight.at[start:stop].set(self.cfg.geometry_loss_scale)
        return weight


Model = WorldModel | SceneModel


def two_hot_bins(cfg: WorldModelConfig) -> Float[Array, " bins"]:
    """Bins of every two-hot head, in symlog space."""
    return jnp.linspace(-cfg.bin_range, cfg.bin_range, cfg.bins)


def kl_losses(posterior: OneHot, prior: OneHot, cfg: WorldModelConfig) -> dict[str, Float[Array, "B T"]]:
    """KL balancing with free nats (DreamerV3, eq. 5).

    dyn = max(free, KL(sg(post) || prior)) trains the prior, rep = max(free, KL(post || sg(prior))) the
    posterior; both are returned with their scales applied.
    """
    sg = jax.lax.stop_gradient
    dyn = jnp.maximum(cfg.free_nats, OneHot(sg(posterior.probs)).kl(prior))
    rep = jnp.maximum(cfg.free_nats, posterior.kl(OneHot(sg(prior.probs))))
    return {"dyn": cfg.dyn_scale * dyn, "rep": cfg.rep_scale * rep}
