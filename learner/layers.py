"""Dense building blocks, initialised as the published DreamerV3/SafeDreamer networks are.

Modules are equinox pytrees whose only leaves are arrays, so plain `jax.jit` and `jax.grad` work.
All of them act on the last axis and broadcast over leading ones.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from learner.precision import matmul

_TRUNCATED_STD = 0.87962566  # standard deviation of a unit normal truncated at 2 sigma
_NORM_EPS = 1e-3

Shape = tuple[int, ...]


def symlog(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sign(x) ln(|x| + 1): compresses large values of either sign (DreamerV3, eq. 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def truncated_normal(key: PRNGKeyArray, shape: Shape, scale: float = 1.0) -> Float[Array, "*k i o"]:
    """Kernel with std sqrt(scale / fan_avg) after truncation at 2 sigma; zeros for scale 0."""
    std = math.sqrt(scale / fan_avg(shape)) / _TRUNCATED_STD
    return std * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def uniform(key: PRNGKeyArray, shape: Shape, scale: float = 1.0) -> Float[Array, "*k i o"]:
    """Kernel drawn uniformly with std sqrt(scale / fan_avg); zeros for scale 0."""
    limit = math.sqrt(3.0 * scale / fan_avg(shape))
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def fan_avg(shape: Shape) -> float:
    """Mean of fan-in and fan-out of a kernel [*taps, in, out]."""
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2


class Classes(eqx.Module):
    """S one-hot vectors side by side, by their classes: `Linear` gathers rows where it would multiply.

    For what needs no gradient: a planner's candidates.
    """

    index: Int[Array, "*n S"]
    count: int = eqx.field(static=True)  # K classes each

    def matmul(self, weight: Float[Array, "S*K o"]) -> Float[Array, "*n o"]:
        """one_hot(index) W, without the zeros."""
        size = self.index.shape[-1]
        rows = weight.reshape(size, self.count, -1)
        return rows.at[jnp.arange(size), self.index].get(mode="promise_in_bounds").sum(-2)


# What a layer reads: an array, or what would make one if its classes were written out.
Inputs = Array | tuple[Array | Classes, ...]


def join(*parts: Inputs | Classes) -> Inputs:
    """Concatenates over the last axis; with classes among them, as far as a `Linear` can tell."""
    flat = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
    arrays = [part for part in flat if not isinstance(part, Classes)]
    return jnp.concatenate(arrays, -1) if len(arrays) == len(flat) else tuple(flat)


class Linear(eqx.Module):
    """x W (+ b). As published, output layers (with a bias) start uniform, the others truncated normal."""

    weight: Float[Array, "i o"]
    bias: Float[Array, " o"] | None

    def __init__(
        self, key: PRNGKeyArray, fan_in: int, fan_out: int, *, bias: bool = True, outscale: float = 1.0
    ):
        self.weight = (uniform if bias else truncated_normal)(key, (fan_in, fan_out), outscale)
        self.bias = jnp.zeros(fan_out) if bias else None

    def __call__(self, x: Inputs) -> Float[Array, "*n o"]:
        y = self._parts(x) if isinstance(x, tuple) else matmul(x, self.weight)
        return y if self.bias is None else y + self.bias

    def _parts(self, parts: tuple[Array | Classes, ...]) -> Float[Array, "*n o"]:
        products, start = [], 0
        for part in parts:
            width = part.index.shape[-1] * part.count if isinstance(part, Classes) else part.shape[-1]
            rows = self.weight[start : start + width]
            products.append(part.matmul(rows) if isinstance(part, Classes) else matmul(part, rows))
            start += width
        return sum(products[1:], products[0])


def _mean(x: Float[Array, "*n d"]) -> Float[Array, "*n 1"]:
    """Mean over the last axis. On CPU a matrix product: XLA vectorises it, but no sum over a short axis."""
    if jax.default_backend() != "cpu":
        return x.mean(-1, keepdims=True)
    return x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)


@jax.custom_vjp
def standardize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """(x - E x) / sqrt(Var x + 1e-3) over the last axis.

    Its gradient is written out, r (g - E g - y E(g y)) with r = 1 / sqrt(Var x + 1e-3) and the result y: half
    the time of the derived one, and only y and r are kept for it.
    """
    return _standardize(x)[0]


def _standardize(x: Array) -> tuple[Array, tuple[Array, Array]]:
    x = x - _mean(x)
    r = jax.lax.rsqrt(_mean(jnp.square(x)) + _NORM_EPS)
    y = x * r
    return y, (y, r)


def _standardize_grad(kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, r = kept
    return (r * (g - _mean(g) - y * _mean(g * y)),)


standardize.defvjp(_standardize, _standardize_grad)


class LayerNorm(eqx.Module):
    """Normalises the last axis in float32, whatever the compute precision."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]

    def __init__(self, size: int):
        self.scale = jnp.ones(size)
        self.bias = jnp.zeros(size)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = standardize(x.astype(jnp.float32))
        return (y * self.scale + self.bias).astype(x.dtype)


class Dense(eqx.Module):
    """SiLU(LayerNorm(x W)); the norm's bias makes a bias of the kernel redundant."""

    linear: Linear
    norm: LayerNorm

    def __init__(self, key: PRNGKeyArray, fan_in: int, fan_out: int):
        self.linear = Linear(key, fan_in, fan_out, bias=False)
        self.norm = LayerNorm(fan_out)

    def __call__(self, x: Inputs) -> Float[Array, "*n o"]:
        return jax.nn.silu(self.norm(self.linear(x)))


class MLP(eqx.Module):
    """`layers` hidden `Dense` layers of width `units`; no output layer."""

    layers: tuple[Dense, ...]

    def __init__(self, key: PRNGKeyArray, fan_in: int, units: int, layers: int):
        keys = jax.random.split(key, layers)
        sizes = [fan_in] + [units] * layers
        self.layers = tuple(Dense(k, i, o) for k, i, o in zip(keys, sizes, sizes[1:], strict=False))

    def __call__(self, x: Any) -> Any:
        """[*n, units] of `Inputs`; without layers these themselves."""
        for layer in self.layers:
            x = layer(x)
        return x


class Head(eqx.Module):
    """An MLP and a linear output layer."""

    mlp: MLP
    out: Linear

    def __init__(
        self, key: PRNGKeyArray, fan_in: int, units: int, layers: int, fan_out: int, outscale: float = 1.0
    ):
        key_mlp, key_out = jax.random.split(key)
        self.mlp = MLP(key_mlp, fan_in, units, layers)
        self.out = Linear(key_out, units if layers else fan_in, fan_out, outscale=outscale)

    def __call__(self, x: Inputs) -> Float[Array, "*n o"]:
        return self.out(self.mlp(x))
