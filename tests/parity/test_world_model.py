"""Encoder, RSSM, decoder, heads and losses on the recorded batch.

The world model's recording of OSRP-Lag is bit for bit that of BSRP-Lag: one vision system is enough.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.types import Batch
from learner.distributions import OneHot, straight_through
from learner.rssm import Latent
from learner.world_model import WorldModel, kl_losses
from tests.parity.recorded import BINS, System, assert_close, latents, pinned

KEY = jax.random.PRNGKey(0)


class Inputs(NamedTuple):
    batch: Batch
    sampled: jax.Array  # recorded true draws of the posterior, to be forced [B, T, S, K]
    latent: Latent  # from which one step is imagined
    action: jax.Array  # with values outside [-1, 1]
    extreme: jax.Array  # reward targets beyond the bins


def quantities(model: WorldModel, inputs: Inputs) -> dict[str, Any]:
    """Everything that is compared, by its recorded name; compiled once per observation."""
    batch = inputs.batch
    with pinned() as patch:
        total, (observed, metrics) = model.loss(batch, KEY)
        # The recorded draws take the place of noise.
        forced = jnp.asarray(inputs.sampled.swapaxes(0, 1))
        patch.setattr(jax.random, "uniform", lambda key, shape: forced)
        patch.setattr(OneHot, "sample_with", lambda one_hot, draw: straight_through(draw, one_hot.probs))
        sampled = model.observe(batch, KEY)
    post = observed.latents
    imagined = model.rssm.img_step(inputs.latent, inputs.action, uniform=None)
    images = model.decode_images(post)
    unscaled = dataclasses.replace(model.cfg, dyn_scale=1.0, rep_scale=1.0)
    kl = kl_losses(sampled.posterior, sampled.prior, unscaled)
    reward, cont = model.reward(post), model.cont(post)
    out = {
        "embed": model.encode({name: batch[name] for name in model.obs_keys}),
        "initial/deter": model.rssm.initial(4).deter,
        "initial/stoch": model.rssm.initial(4).stoch,
        "post/deter": post.deter,
        "post/stoch": post.stoch,
        "post/logit": observed.posterior.logits,
        "prior/logit": observed.prior.logits,
        "post_sampled/deter": sampled.latents.deter,
        "post_sampled/stoch": sampled.latents.stoch,
        "post_sampled/logit": sampled.posterior.logits,
        "prior_sampled/logit": sampled.prior.logits,
        "img_step/out/deter": imagined.deter,
        "img_step/out/logit": model.rssm.prior(imagined.deter).logits,
        "head/reward/mean": reward.mean,
        "head/reward/log_prob": reward.log_prob(batch["reward"]),
        "head/reward/extreme_log_prob": reward.log_prob(inputs.extreme),
        "head/cont/mean": jax.nn.sigmoid(cont.logit),
        "head/cont/mode": cont.mode,
        "head/cont/log_prob": cont.log_prob(1.0 - batch["is_terminal"]),
        "dyn_loss": kl["dyn"],
        "rep_loss": kl["rep"],
        "kl_raw": sampled.posterior.kl(sampled.prior),
        "entropy/post": sampled.posterior.entropy(),
        "entropy/prior": sampled.prior.entropy(),
        "wm_loss": total,
        "terms": metrics,
        "decoded": images,
    }
    if model.decoder.vector is not None:
        out["dec/observation"] = model.decode_vector(post)
    if model.cost_head is not None:
        cost = model.cost(post)
        out |= {"head/cost/mean": cost.mean, "head/cost/log_prob": cost.log_prob(batch["cost"])}
    return out


def compute(system: System) -> dict[str, Any]:
    recorded = system.recorded
    inputs = Inputs(
        system.batch,
        jnp.asarray(recorded["post_sampled/stoch"]),
        latents(recorded, "img_step/in_deter", "img_step/in_stoch"),
        jnp.asarray(recorded["img_step/action"]),
        jnp.asarray(recorded["head/reward/extreme_target"]),
    )
    return jax.device_get(jax.jit(quantities)(system.state.model, inputs))


@pytest.fixture(scope="module")
def of_vector(vector: System) -> dict[str, Any]:
    return compute(vector)


@pytest.fixture(scope="module")
def of_images(augmented: System) -> dict[str, Any]:
    # Without its optimisations XLA adds the 24,576 squared errors of an image one by one in float32, which
    # alone is wrong by 4e-5.
    jax.config.update("jax_disable_most_optimizations", False)
    computed = compute(augmented)
    jax.config.update("jax_disable_most_optimizations", True)
    return computed


@pytest.fixture(params=["vector", "images"])
def case(request: pytest.FixtureRequest) -> tuple[System, dict[str, Any]]:
    of = {"vector": ("vector", "of_vector"), "images": ("augmented", "of_images")}[request.param]
    return request.getfixturevalue(of[0]), request.getfixturevalue(of[1])


def compare(case: tuple[System, dict[str, Any]], *prefixes: str) -> None:
    system, ours = case
    names = [name for name in ours if name.startswith(prefixes) and name in system.recorded]
    assert len(names) >= len(prefixes)
    for name in names:
        terms = BINS if name.endswith(("reward/mean", "cost/mean")) else 0.0
        assert_close(ours[name], system.recorded[name], terms=terms, name=name)


def test_encoder(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "embed")


def test_initial_state(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "initial/")


def test_posterior_and_prior(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "post/", "prior/")


def test_posterior_and_prior_along_true_draws(case: tuple[System, dict[str, Any]]) -> None:
    _, ours = case
    assert (ours["post_sampled/stoch"] != ours["post/stoch"]).any()  # the draws are no modes
    compare(case, "post_sampled/", "prior_sampled/")


def test_imagined_step_clips_actions(case: tuple[System, dict[str, Any]]) -> None:
    assert np.abs(case[0].recorded["img_step/action"]).max() > 1.0
    compare(case, "img_step/")


def test_heads(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "head/reward/", "head/cont/")


def test_mode_of_two_hot_heads_is_their_mean(case: tuple[System, dict[str, Any]]) -> None:
    assert_close(case[1]["head/reward/mean"], case[0].recorded["head/reward/mode"], terms=BINS)


def test_cost_head(augmented: System, of_images: dict[str, Any]) -> None:
    compare((augmented, of_images), "head/cost/")


def test_vector_decoder(vector: System, of_vector: dict[str, Any]) -> None:
    compare((vector, of_vector), "dec/")


def test_image_decoder(augmented: System, of_images: dict[str, Any]) -> None:
    assert list(of_images["decoded"]) == ["image", "image2"]
    for name, image in of_images["decoded"].items():
        assert_close(image[:1, :2], augmented.recorded[f"dec/{name}"], name=name)
        # One number for every image: the squared error summed over its pixels.
        truth = augmented.batch[name].astype(np.float32) / 255.0
        error = np.square(image - truth, dtype=np.float64).sum((-3, -2, -1))
        assert_close(error, augmented.recorded[f"dec_loss/{name}"], name=name)


def test_kl_and_entropies(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "dyn_loss", "rep_loss", "kl_raw", "entropy/")


def test_whole_loss_and_its_terms(case: tuple[System, dict[str, Any]]) -> None:
    system, ours = case
    losses, terms, cfg = system.group("wm_losses"), ours["terms"], system.cfg.world_model
    assert_close(ours["wm_loss"], system.recorded["wm_loss"])
    scales = {"dyn": cfg.dyn_scale, "rep": cfg.rep_scale, "vector": cfg.vector_loss_scale}
    theirs = {
        name.removesuffix("_loss").replace("observation", "vector").replace("image2", "image"): 0.0
        for name in losses
    }
    for name, loss in losses.items():
        term = name.removesuffix("_loss").replace("observation", "vector").replace("image2", "image")
        theirs[term] += scales.get(term, 1.0) * loss.mean(dtype=np.float64)
    assert {f"loss/{name}" for name in theirs} == {name for name in terms if name.startswith("loss/")}
    for name, loss in theirs.items():
        assert_close(terms[f"loss/{name}"], np.asarray(loss), name=name)


def test_cost_loss_weighs_violations(augmented: System, of_images: dict[str, Any]) -> None:
    cost = augmented.batch["cost"]
    assert (cost >= 1).any()
    weight = np.where(cost >= 1, 10.0, 1.0)
    assert_close(-weight * of_images["head/cost/log_prob"], augmented.recorded["wm_losses/cost_loss"])


def test_one_hot_logits_are_normalised(case: tuple[System, dict[str, Any]]) -> None:
    np.testing.assert_allclose(np.exp(case[1]["post/logit"]).sum(-1), 1.0, rtol=1e-5)
