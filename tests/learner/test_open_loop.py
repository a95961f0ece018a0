from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.types import ArraySpec
from learner.cost_model import State, learned_cost, look_at, look_away, tracked_obstacles, tracked_reward
from learner.layout import layout_of
from learner.open_loop import open_loop
from learner.scene import SceneModel, seen
from learner.world_model import WorldModel
from tests.learner.tiny import MODEL, SCENE, SPEC, batch, filled

CONTEXT = 3
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
BATCH = {name: jnp.asarray(x) for name, x in batch(size=2, length=7).items()}


def build(spec=SPEC, **kinds: bool) -> WorldModel:
    return filled(lambda: WorldModel(jax.random.PRNGKey(0), spec, MODEL, **kinds))


def test_it_is_a_sequence_of_single_steps() -> None:
    model = build(learn_cost=True)
    predicted = open_loop(model, learned_cost, look_away, BATCH, CONTEXT)
    latent = model.rssm.initial(2)
    for t in range(7):
        action = BATCH["action"][:, t - 1] if t else jnp.zeros((2, 2))
        if t < CONTEXT:
            embed = model.encode({"vector": BATCH["vector"][:, t]})
            latent = model.rssm.obs_step(latent, action, jnp.array([t == 0] * 2), embed, uniform=None)
        else:
            latent = model.rssm.img_step(latent, action, uniform=None)
        np.testing.assert_allclose(predicted.reward[:, t], model.reward(latent).mean, **CLOSE)
        np.testing.assert_allclose(predicted.cost[:, t], model.cost(latent).mean, **CLOSE)
        assert predicted.vector is not None
        np.testing.assert_allclose(predicted.vector[:, t], model.decode_vector(latent), **CLOSE)
    assert predicted.hazards is None
    assert predicted.images == {}


def test_what_comes_after_the_context_is_not_looked_at() -> None:
    model = build(learn_cost=True)
    blind = BATCH | {"vector": BATCH["vector"].at[:, CONTEXT:].set(9.0)}
    seen, unseen = (open_loop(model, learned_cost, look_away, b, CONTEXT) for b in (BATCH, blind))
    np.testing.assert_array_equal(seen.reward, unseen.reward)
    other = BATCH | {"vector": BATCH["vector"].at[:, CONTEXT - 1].set(9.0)}
    assert (open_loop(model, learned_cost, look_away, other, CONTEXT).reward != seen.reward)[
        :, CONTEXT:
    ].any()


@pytest.mark.parametrize("latent", [True, False])
def test_a_tracked_scene_starts_where_it_was_last_seen(latent: bool) -> None:
    vector = np.random.default_rng(3).normal(size=(2, 7, 13)).astype(np.float32)
    data, layout = BATCH | {"vector": jnp.asarray(vector)}, layout_of(SCENE)
    model: Any = build(SCENE, learn_cost=False, learn_motion=True)
    if not latent:
        model = filled(lambda: SceneModel(jax.random.PRNGKey(0), SCENE, MODEL))
    count = tracked_obstacles(2.0)
    predicted = open_loop(model, count, look_at(layout), data, CONTEXT, tracked_reward)
    assert predicted.hazards is not None
    true = vector[..., 5:9].reshape(2, 7, 2, 2)
    np.testing.assert_array_equal(predicted.hazards[:, :CONTEXT], true[:, :CONTEXT])
    assert (predicted.vector is not None) == latent

    scene = seen(layout, data["vector"][:, 0])
    for t in range(1, 7):
        scene = model.body.move(scene, data["action"][:, t - 1])
        np.testing.assert_allclose(predicted.reward[:, t], scene.reward, **CLOSE)
        if t < CONTEXT:
            scene = seen(layout, data["vector"][:, t])
        np.testing.assert_allclose(predicted.hazards[:, t], scene.obstacles, **CLOSE)
        cost = count(model, State(model.initial(2), scene))
        np.testing.assert_array_equal(predicted.cost[:, t], cost)


def test_images_are_decoded_by_their_names() -> None:
    spec = replace(
        SPEC, obs={"image": ArraySpec((8, 8, 3), "uint8"), "image2": ArraySpec((8, 8, 3), "uint8")}
    )
    images = {name: jnp.full((2, 7, 8, 8, 3), 40, jnp.uint8) for name in spec.obs}
    predicted = open_loop(build(spec, learn_cost=True), learned_cost, look_away, BATCH | images, CONTEXT)
    assert {name: x.shape for name, x in predicted.images.items()} == {
        "image": (2, 7, 8, 8, 3),
        "image2": (2, 7, 8, 8, 3),
    }
    assert predicted.vector is None
