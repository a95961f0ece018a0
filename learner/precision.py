"""Matrix products and convolutions, in float32 or on bfloat16 inputs.

`compute_in("bfloat16")` rounds both inputs of every product that is traced inside it, forward and backward;
products are summed in float32. Parameters, and all that lies between two products, stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Precision = Literal["float32", "bfloat16"]

# Of what this thread traces: the learner's step may be traced while another thread traces a policy.
_precision: ContextVar[Precision] = ContextVar("precision", default="float32")


@contextmanager
def compute_in(precision: Precision) -> Iterator[None]:
    """Inside it, products are traced in that precision; enter it within a traced function, not around one."""
    token = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(token)


def matmul(x: Float[Array, "*n i"], weight: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """x W."""
    return x @ weight if _precision.get() == "float32" else _matmul_bfloat16(x, weight)


def convolve(
    operation: Callable[..., Array], x: Float[Array, "n h w i"], kernel: Float[Array, "4 4 i o"], **how: Any
) -> Float[Array, "n h2 w2 o"]:
    """`operation(x, kernel, **how)`, one of the convolutions of `jax.lax`."""
    if _precision.get() == "float32":
        return operation(x, kernel, **how)

    # Gradients are summed in float32 and then rounded: convolutions with float32 results have none in JAX.
    def plain(x: Array, kernel: Array) -> Array:
        return operation(x, kernel, **how)

    @jax.custom_vjp
    def rounded(x: Array, kernel: Array) -> Array:
        return operation(_round(x), _round(kernel), preferred_element_type=jnp.float32, **how)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return rounded(x, kernel), (_round(x), _round(kernel))

    def backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        x, kernel = kept
        (g_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(_round(g))
        (g_kernel,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(_round(g))
        return g_x.astype(jnp.float32), g_kernel.astype(jnp.float32)

    rounded.defvjp(forward, backward)
    return rounded(x, kernel)


@jax.custom_vjp
def _matmul_bfloat16(x: Array, weight: Array) -> Array:
    return _product(_round(x), _round(weight), (x.ndim - 1,), (0,))


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul_bfloat16(x, weight), (_round(x), _round(weight))


def _backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = kept
    g, leading = _round(g), tuple(range(x.ndim - 1))
    return _product(g, weight, (g.ndim - 1,), (1,)), _product(x, g, leading, leading)


_matmul_bfloat16.defvjp(_forward, _backward)


def _product(x: Array, y: Array, over_x: tuple[int, ...], over_y: tuple[int, ...]) -> Array:
    """Sum of products over the axes `over_x` of x and `over_y` of y, in float32."""
    return jax.lax.dot_general(x, y, ((over_x, over_y), ((), ())), preferred_element_type=jnp.float32)


def _round(x: Array) -> Array:
    return x.astype(jnp.bfloat16)
