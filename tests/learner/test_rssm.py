from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learner import rssm as rssm_module
from learner.distributions import OneHot
from learner.rssm import RSSM, Latent
from tests.learner.tiny import MODEL, filled

EMBED, ACTION, SIZE, TIME = 5, 2, 2, 5
KEY = jax.random.PRNGKey(3)

observe = jax.jit(RSSM.observe)
recur = jax.jit(RSSM.recur)


@pytest.fixture(scope="module")
def rssm() -> RSSM:
    return filled(lambda: RSSM(jax.random.PRNGKey(0), MODEL, ACTION, EMBED))


def window() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    embed = rng.normal(size=(SIZE, TIME, EMBED)).astype(np.float32)
    action = rng.uniform(-1, 1, (SIZE, TIME, ACTION)).astype(np.float32)
    is_first = np.zeros((SIZE, TIME), bool)
    is_first[0, 2] = True
    return embed, action, is_first


def some_latent() -> Latent:
    stoch = np.eye(3, dtype=np.float32)[[[0, 2], [1, 1]]]
    return Latent(jnp.linspace(-1, 1, SIZE * 8).reshape(SIZE, 8), jnp.array(stoch))


def test_observe_equals_filtering_step_by_step(rssm: RSSM) -> None:
    embed, action, is_first = window()
    latents, _, prior = observe(rssm, embed, action, is_first, KEY)
    uniform = jax.random.uniform(KEY, (TIME, SIZE, MODEL.stoch))
    step = jax.jit(RSSM.obs_step)
    latent, previous = rssm.initial(SIZE), np.zeros((SIZE, ACTION), np.float32)
    for t in range(TIME):
        latent = step(rssm, latent, previous, is_first[:, t], embed[:, t], uniform[t])
        np.testing.assert_allclose(latents.deter[:, t], latent.deter, atol=1e-5)
        np.testing.assert_array_equal(np.round(latents.stoch[:, t]), np.round(latent.stoch))
        np.testing.assert_allclose(prior.logits[:, t], rssm.prior(latent.deter).logits, atol=1e-4)
        previous = action[:, t]


def test_nothing_before_is_first_matters(rssm: RSSM) -> None:
    embed, action, is_first = window()
    other_embed, other_action = -3 * embed, -action
    other_embed[0, 2:], other_action[0, 2:] = embed[0, 2:], action[0, 2:]
    ours = observe(rssm, embed, action, is_first, KEY)
    theirs = observe(rssm, other_embed, other_action, is_first, KEY)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a[0, 2:], b[0, 2:])
    difference = np.abs(ours[0].deter - theirs[0].deter).max(-1)
    assert (difference[1, 2:] > 1e-3).all()  # no reset there: the past goes on
    assert difference[0, 1] > 1e-3
    assert np.abs(ours[0].stoch - theirs[0].stoch)[0, 1].max() == 1.0


def test_a_window_starts_as_after_a_reset(rssm: RSSM) -> None:
    embed, action, is_first = window()
    reset = is_first.copy()
    reset[:, 0] = True
    ours, theirs = (observe(rssm, embed, action, flags, KEY)[0] for flags in (is_first, reset))
    np.testing.assert_array_equal(ours.deter, theirs.deter)


def test_an_action_is_consumed_one_step_later(rssm: RSSM) -> None:
    embed, action, is_first = window()
    changed = action.copy()
    changed[1, 2] += 0.5
    before, after = (observe(rssm, embed, a, is_first, KEY)[0].deter for a in (action, changed))
    moved = np.abs(np.asarray(before - after)).max(-1) > 1e-6
    np.testing.assert_array_equal(moved[1, :4], [False, False, False, True])
    assert not moved[0].any()


def test_actions_out_of_range_are_rescaled(rssm: RSSM) -> None:
    latent = some_latent()
    outside, border = jnp.array([[3.0, -0.5], [-7.0, 0.2]]), jnp.array([[1.0, -0.5], [-1.0, 0.2]])
    np.testing.assert_allclose(recur(rssm, latent, outside), recur(rssm, latent, border), rtol=1e-6)
    # The factor carries no gradient: that of the border, divided by the size of the action.
    gradient = jax.jit(jax.grad(lambda action: recur(rssm, latent, action).sum()))
    ratio = gradient(outside) / gradient(border)
    np.testing.assert_allclose(ratio, [[1 / 3, 1.0], [1 / 7, 1.0]], rtol=1e-4)


def test_gru_by_hand(rssm: RSSM) -> None:
    # With a zero kernel the gates are the norm's biases: reset 1, candidate 2, update 0.5.
    bias = jnp.repeat(jnp.array([1.0, 2.0, 0.5]), MODEL.deter)
    fixed = eqx.tree_at(
        lambda m: (m.gru.weight, m.gru_norm.bias), rssm, (jnp.zeros_like(rssm.gru.weight), bias)
    )
    latent = some_latent()

    def sigmoid(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    update, candidate = sigmoid(0.5 - 1), np.tanh(sigmoid(1.0) * 2)
    expected = update * candidate + (1 - update) * np.asarray(latent.deter)
    np.testing.assert_allclose(recur(fixed, latent, jnp.zeros((SIZE, ACTION))), expected, rtol=1e-5)


def test_initial_state_is_learned(rssm: RSSM) -> None:
    latent = rssm.initial(3)
    np.testing.assert_allclose(latent.deter, np.tile(np.tanh(rssm.initial_deter), (3, 1)), rtol=1e-6)
    np.testing.assert_array_equal(latent.stoch[1], rssm.prior(latent.deter[1]).mode())

    def loss(model: RSSM) -> jax.Array:
        initial = model.initial()
        return initial.deter.sum() + (initial.stoch * jnp.arange(3.0)).sum()

    gradient = jax.grad(loss)(rssm)
    np.testing.assert_allclose(gradient.initial_deter, 1 - np.tanh(rssm.initial_deter) ** 2, rtol=1e-5)
    # The stochastic part is a mode: it teaches the prior nothing (as in the published code).
    np.testing.assert_array_equal(gradient.prior_logits.weight, 0.0)


def test_imagination_draws_from_the_prior(rssm: RSSM) -> None:
    latent, action = some_latent(), jnp.full((SIZE, ACTION), 0.3)
    uniform = jax.random.uniform(KEY, (SIZE, 2))
    following = jax.jit(RSSM.img_step)(rssm, latent, action, uniform)
    deter = recur(rssm, latent, action)
    np.testing.assert_allclose(following.deter, deter, rtol=1e-5)
    expected = jax.jit(lambda deter: rssm.prior(deter).sample_with(uniform))(deter)
    np.testing.assert_array_equal(following.stoch, expected)


@pytest.mark.parametrize("mode", [False, True])
def test_imagination_by_classes_is_the_same(rssm: RSSM, mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, action = some_latent(), jnp.full((SIZE, ACTION), 0.3)
    uniform = None if mode else jax.random.uniform(KEY, (SIZE, 2))
    expected = RSSM.img_step(rssm, latent, action, uniform)
    assert latent.by_classes() is latent  # so few are multiplied faster
    monkeypatch.setattr(rssm_module, "_GATHERED_CLASSES", 3)
    following = RSSM.img_step(rssm, latent.by_classes(), action, uniform)
    np.testing.assert_allclose(following.deter, expected.deter, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.nn.one_hot(following.stoch.index, 3), expected.stoch)
    assert expected.by_classes().by_classes().stoch.count == 3


def test_probabilities_are_mixed_with_the_uniform(rssm: RSSM) -> None:
    extreme = eqx.tree_at(lambda m: m.prior_logits.bias, rssm, rssm.prior_logits.bias + 100 * jnp.eye(6)[0])
    probs = extreme.prior(some_latent().deter).probs
    assert float(probs.min()) == pytest.approx(0.01 / 3, rel=1e-3)
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-6)


def test_feat_is_deter_then_stoch() -> None:
    latent = some_latent()
    np.testing.assert_array_equal(latent.feat[:, :8], latent.deter)
    np.testing.assert_array_equal(latent.feat[0, 8:], [1, 0, 0, 0, 0, 1])


def test_posterior_depends_on_the_embedding_and_prior_does_not(rssm: RSSM) -> None:
    embed, action, is_first = window()
    changed = embed.copy()
    changed[:, -1] += 1.0
    (_, post_a, prior_a), (_, post_b, prior_b) = (
        observe(rssm, e, action, is_first, KEY) for e in (embed, changed)
    )
    np.testing.assert_array_equal(prior_a.logits, prior_b.logits)
    assert float(OneHot(post_a.probs[:, -1]).kl(OneHot(post_b.probs[:, -1])).min()) > 1e-3
