from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import WorldModelConfig
from learner.distributions import OneHot, uniform_mix
from learner.layers import symlog
from learner.world_model import WorldModel, kl_losses
from tests.learner.tiny import MODEL, SCENE, SPEC, batch, filled

KEY = jax.random.PRNGKey(0)
loss = jax.jit(WorldModel.loss)


def build(cfg: WorldModelConfig = MODEL, *, learn_cost: bool = True) -> WorldModel:
    return filled(lambda: WorldModel(KEY, SPEC, cfg, learn_cost=learn_cost))


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return build()


def pair(distance: float) -> tuple[OneHot, OneHot]:
    """Two distributions whose KL grows with the distance; B = T = 1, S = 2, K = 3."""
    ramp = jnp.tile(jnp.array([-1.0, 0.0, 1.0]), (1, 1, 2, 1))
    return OneHot(uniform_mix(2 * distance * ramp, 0.01)), OneHot(uniform_mix(-distance * ramp, 0.01))


def test_kl_balance_by_hand() -> None:
    posterior, prior = pair(1.0)
    kl = float(posterior.kl(prior)[0, 0])
    assert kl > 1.0
    assert abs(kl - float(prior.kl(posterior)[0, 0])) > 0.1  # the direction counts
    losses = kl_losses(posterior, prior, MODEL)
    assert float(losses["dyn"][0, 0]) == pytest.approx(0.5 * kl, rel=1e-6)
    assert float(losses["rep"][0, 0]) == pytest.approx(0.1 * kl, rel=1e-6)


def test_free_nats_bound_both_losses_from_below() -> None:
    losses = kl_losses(*pair(0.2), MODEL)
    assert float(losses["dyn"][0, 0]) == 0.5
    assert float(losses["rep"][0, 0]) == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "trained", "frozen"), [("dyn", 1, 0), ("rep", 0, 1)])
def test_kl_losses_train_one_side_each(name: str, trained: int, frozen: int) -> None:
    def total(probs: list[jax.Array]) -> jax.Array:
        return kl_losses(OneHot(probs[0]), OneHot(probs[1]), MODEL)[name].sum()

    far = jax.grad(total)([x.probs for x in pair(1.0)])
    assert np.abs(far[trained]).max() > 1e-2
    np.testing.assert_array_equal(far[frozen], 0.0)
    near = jax.grad(total)([x.probs for x in pair(0.2)])  # within the free nats
    np.testing.assert_array_equal(near[trained], 0.0)


def test_the_loss_is_the_sum_of_its_parts(model: WorldModel) -> None:
    data = batch()
    total, (observed, metrics) = loss(model, data, KEY)
    parts = {name[5:]: float(x) for name, x in metrics.items() if name.startswith("loss/")}
    assert float(total) == pytest.approx(sum(parts.values()), rel=1e-5)

    def by_hand(model: WorldModel, data: dict) -> dict[str, jax.Array]:
        latents = observed.latents
        weight = jnp.where(data["cost"] >= 1, 10.0, 1.0)
        return {
            "reward": -model.reward(latents).log_prob(data["reward"]),
            "cost": -weight * model.cost(latents).log_prob(data["cost"]),
            "vector": jnp.square(model.decode_vector(latents) - data["vector"]).sum(-1),
            "cont": -model.cont(latents).log_prob(1.0 - data["is_terminal"]),
            **kl_losses(observed.posterior, observed.prior, MODEL),
        }

    assert {0.0, 1.0} == set(np.unique(data["cost"] >= 1))
    expected = {name: float(x.mean()) for name, x in jax.jit(by_hand)(model, data).items()}
    assert parts == pytest.approx(expected, rel=1e-5)


def test_continuation_ends_at_terminations_only(model: WorldModel) -> None:
    data = batch()
    confident = eqx.tree_at(
        lambda m: (m.cont_head.out.weight, m.cont_head.out.bias),
        model,
        (jnp.zeros((8, 1)), jnp.array([np.log(3.0)], jnp.float32)),
    )  # predicts 0.75 everywhere
    _, (_, metrics) = loss(confident, data, KEY)
    share = data["is_terminal"].mean()
    expected = -(share * np.log(0.25) + (1 - share) * np.log(0.75))
    assert float(metrics["loss/cont"]) == pytest.approx(expected, rel=1e-5)
    # A time limit ends an episode without a termination: `is_last` alone teaches nothing.
    truncated = data | {"is_last": np.ones_like(data["is_last"])}
    assert float(loss(confident, truncated, KEY)[0]) == float(loss(confident, data, KEY)[0])


def test_vector_loss_is_weighted_by_group() -> None:
    cfg = dataclasses.replace(MODEL, vector_loss_scale=5.0, geometry_loss_scale=3.0)
    model, data = build(cfg), batch()
    _, (observed, metrics) = loss(model, data, KEY)
    error = np.square(model.decode_vector(observed.latents) - data["vector"])
    weight = np.array([1, 1, 3, 3, 3, 3])  # hazards stand at 2..5
    assert float(metrics["loss/vector"]) == pytest.approx(5 * (weight * error).sum(-1).mean(), rel=1e-5)


def test_symlog_decoder_predicts_in_symlog_space() -> None:
    model, data = build(dataclasses.replace(MODEL, decoder_space="symlog")), batch()
    _, (observed, metrics) = loss(model, data, KEY)
    decoded = model.decode_vector(observed.latents)
    error = np.square(symlog(decoded) - symlog(jnp.array(data["vector"]))).sum(-1)
    assert float(metrics["loss/vector"]) == pytest.approx(float(error.mean()), rel=1e-4)


def test_observations_are_squashed_before_the_encoder(model: WorldModel) -> None:
    x = jnp.array([[1e3, -1e3, 0.0, 1.0, 2.0, -5.0]])
    assert model.encoder.vector is not None
    np.testing.assert_allclose(model.encode({"vector": x}), model.encoder.vector(symlog(x)), rtol=1e-6)


def test_a_model_without_costs_has_no_cost_loss() -> None:
    model = build(learn_cost=False)
    _, (observed, metrics) = loss(model, batch(), KEY)
    assert "loss/cost" not in metrics
    with pytest.raises(TypeError, match="learns no cost"):
        model.cost(observed.latents)


def test_motion_is_learned_where_a_scene_is_tracked() -> None:
    cfg = dataclasses.replace(MODEL, motion_loss_scale=3.0)
    model = filled(lambda: WorldModel(KEY, SCENE, cfg, learn_cost=False, learn_motion=True))
    data = batch() | {"vector": np.random.default_rng(0).normal(size=(2, 4, 13)).astype(np.float32)}
    total, (_, metrics) = loss(model, data, KEY)
    assert model.body is not None
    motion = 3 * model.body.loss(data).mean()
    assert float(metrics["loss/motion"]) == pytest.approx(float(motion), rel=1e-4)
    parts = sum(float(x) for name, x in metrics.items() if name.startswith("loss/"))
    assert float(total) == pytest.approx(parts, rel=1e-5)
    assert "loss/motion" not in loss(build(), batch(), KEY)[1][1]


def test_reward_starts_at_zero_and_cost_does_not() -> None:
    fresh = jax.jit(lambda: WorldModel(KEY, SPEC, MODEL, learn_cost=True))()
    latent = fresh.rssm.initial(1)
    assert float(np.abs(fresh.reward(latent).mean).max()) < 1e-6
    assert fresh.cost_head is not None
    assert np.abs(fresh.cost_head.out.weight).max() > 0.1
