"""Training on bfloat16 inputs: which products are rounded, and what that does to the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import checkpoint
from common.config import Config
from common.configuration import merge
from common.types import ArraySpec
from learner.codec import Conv, Deconv
from learner.cost_model import learned_cost
from learner.learner import Learner
from learner.policy import actor_choice, make_policy
from learner.precision import compute_in, matmul
from learner.train_step import Shared, TrainState, TrainStep
from tests.learner.test_train_step import CONSTRAINT, build
from tests.learner.tiny import CONFIG, MODEL, SPEC, batch, filled

SIDE = 8
SEEING = dataclasses.replace(SPEC, obs={**SPEC.obs, "vision": ArraySpec((SIDE, SIDE, 3), "uint8")})
PRODUCTS = ("dot_general", "conv_general_dilated")


def config(precision: str) -> Config:
    return merge(CONFIG, {"learner": {"precision": precision}, "world_model": {"cnn_depth": 2}}, "test")


def seeing(precision: str) -> TrainStep:
    """Every kind of layer: dense, recurrent, convolutions both ways."""
    cfg = config(precision)
    shared = Shared(False, False)
    return TrainStep(SEEING, cfg, CONSTRAINT, learned_cost, learn_cost=True, value_cost=True, shared=shared)


def seen(seed: int = 0) -> dict[str, np.ndarray]:
    data = batch(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (*data["reward"].shape, SIDE, SIDE, 3), np.uint8)
    return data | {"vision": pixels}


def products(jaxpr: Any) -> Iterator[Any]:
    """All equations that multiply matrices or convolve, inside loops as well."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def of_the_step(precision: str) -> list[Any]:
    train = seeing(precision)
    jaxpr = jax.make_jaxpr(train.step)(jax.eval_shape(train.init, 0), seen())
    return list(products(jaxpr.jaxpr))


def inputs(equation: Any) -> set[str]:
    return {str(variable.aval.dtype) for variable in equation.invars}


def is_mean(equation: Any) -> bool:
    """LayerNorm's means, which are float32: on CPU they are written as products with one column."""
    return equation.primitive.name == "dot_general" and equation.invars[1].aval.shape[1:] == (1,)


def is_weight_gradient(equation: Any) -> bool:
    """Such products sum over the windows, not over features."""
    if equation.primitive.name != "dot_general":
        return False
    (over_x, over_y), _ = equation.params["dimension_numbers"]
    return over_x == over_y == tuple(range(equation.invars[0].aval.ndim - 1))


def test_no_product_of_the_step_but_means_has_float32_inputs() -> None:
    found = of_the_step("bfloat16")
    assert {frozenset(inputs(each)) for each in found if not is_mean(each)} == {frozenset({"bfloat16"})}
    for each in found:
        if each.primitive.name == "dot_general":
            assert str(each.outvars[0].aval.dtype) == "float32"  # the sums


def test_the_backward_pass_is_there_in_bfloat16() -> None:
    found = [each for each in of_the_step("bfloat16") if inputs(each) == {"bfloat16"}]
    assert sum(map(is_weight_gradient, found)) >= 15
    convolutions = [each for each in found if each.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 6  # one layer each way: forward, and the gradients of input and kernel


def test_nothing_is_rounded_in_float32() -> None:
    assert {name for each in of_the_step("float32") for name in inputs(each)} == {"float32"}


def test_a_policy_in_the_same_process_stays_float32() -> None:
    train = build(config("bfloat16"))
    state = jax.eval_shape(train.init, 0)
    jax.eval_shape(train.step, state, batch())
    policy = make_policy(actor_choice(explore=True), MODEL.deter, MODEL.stoch, MODEL.classes, 2, 0)
    obs, first = {"vector": jnp.zeros((3, 6))}, jnp.zeros(3, bool)
    arguments = (train.acting(state), policy.init(3), obs, first, jax.random.PRNGKey(0))
    found = list(products(jax.make_jaxpr(policy.act)(*arguments).jaxpr))
    assert {name for each in found for name in inputs(each)} == {"float32"}


# --- numbers --------------------------------------------------------------------------------------


def test_a_product_and_its_gradients_by_hand() -> None:
    """1 + 1/256 has one bit too many for bfloat16 and becomes 1; sums keep theirs."""
    x, weight = jnp.array([[1 + 1 / 256, 256.0]]), jnp.array([[1.0], [1 + 1 / 256]])
    scale = jnp.array([[1 + 1 / 256]])

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return (scale * matmul(x, weight)).sum()

    with compute_in("bfloat16"):
        np.testing.assert_array_equal(matmul(x, weight), [[257.0]])  # bfloat16 would say 256
        g_x, g_weight = jax.grad(loss, (0, 1))(x, weight)
    np.testing.assert_array_equal(matmul(x, weight), [[258 + 1 / 256]])
    np.testing.assert_array_equal(g_x, [[1.0, 1.0]])
    np.testing.assert_array_equal(g_weight, [[1.0], [256.0]])


@pytest.mark.parametrize("make", [lambda k: Conv(k, 3, 4), lambda k: Deconv(k, 3, 4, plain=True)])
def test_convolutions_and_their_gradients_are_near_those_of_float32(make: Any) -> None:
    layer = make(jax.random.PRNGKey(0))
    x = jax.random.normal(jax.random.PRNGKey(1), (2, 8, 8, 3))

    def loss(layer: Any, x: jax.Array) -> jax.Array:
        return jnp.square(layer(x)).sum()

    exact = jax.value_and_grad(loss, (0, 1))(layer, x)
    with compute_in("bfloat16"):
        rounded = jax.value_and_grad(loss, (0, 1))(layer, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    assert 1e-5 < distance(exact, rounded) < 1e-2


def distance(exact: Any, other: Any) -> float:
    """Norm of the difference over the norm."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (exact, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_gradients_of_the_world_model_are_near_those_of_float32() -> None:
    """Without a draw from the posterior, which rounding may turn to another class."""
    train = seeing("float32")
    model = filled(lambda: train.init(0).model, scale=0.2)
    data = seen()

    def loss(model: Any) -> jax.Array:
        latent = model.rssm.initial(2)
        obs = {name: data[name][:, 0] for name in model.obs_keys}
        embed = model.encode(obs)
        first = jnp.zeros(2, bool)
        post = model.rssm.obs_step(latent, jnp.asarray(data["action"][:, 0]), first, embed, None)
        images = jnp.stack(list(model.decode_images(post).values()))
        return jnp.square(model.decode_vector(post)).sum() + jnp.square(images).sum() + post.deter.sum()

    exact = jax.grad(loss)(model)
    with compute_in("bfloat16"):
        rounded = jax.grad(loss)(model)
    assert 1e-4 < distance(exact, rounded) < 3e-2


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[TrainState, TrainState, dict[str, Any]]:
    train = seeing("bfloat16")
    start = train.start()
    state, metrics = jax.jit(train.step)(start, seen())
    return start, state, metrics


def test_everything_that_is_kept_stays_float32(trained: tuple[TrainState, TrainState, dict]) -> None:
    start, state, metrics = trained
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((state, metrics))}
    assert kinds <= {"float32", "int32", "uint32"}
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, start)
    assert int(state.updates) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_losses_are_near_those_of_float32(trained: tuple[TrainState, TrainState, dict]) -> None:
    start, _, rounded = trained
    _, exact = jax.jit(seeing("float32").step)(start, seen())
    for name in ("vector", "image", "reward", "cont"):
        assert float(rounded[f"loss/{name}"]) == pytest.approx(float(exact[f"loss/{name}"]), rel=0.05), name
    assert any(float(rounded[name]) != float(exact[name]) for name in exact)


def test_a_checkpoint_goes_on_in_the_other_precision(
    trained: tuple[TrainState, TrainState, dict], tmp_path: Path
) -> None:
    _, state, _ = trained
    checkpoint.save(tmp_path, 1, jax.device_get(state), {"updates": 1, "version": 1})
    learner = Learner(seeing("float32"), lambda _: None, lambda *_: None, tmp_path)
    restored = learner.restore(tmp_path)
    assert restored is not None
    assert not restored.skipped
    for saved, taken in zip(*map(jax.tree.leaves, (state, learner._state)), strict=True):
        np.testing.assert_array_equal(saved, taken)
