"""Encoder and decoder of observations: vectors by MLPs, images by convolutions (ALGORITHM: section 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from common.config import WorldModelConfig
from common.types import VECTOR, EnvSpec
from learner.layers import MLP, Head, LayerNorm, Linear, symlog, truncated_normal, uniform
from learner.precision import convolve

Obs = Mapping[str, Array]  # name -> [*n, ...], see `EnvSpec.obs`

_KERNEL = 4
_STRIDES = (2, 2)
_SAME = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
_SMALLEST = 4  # side of the last feature map, pixels


class Conv(eqx.Module):
    """A 4x4 convolution that halves height and width: SiLU(LayerNorm(conv(x))), normed over channels."""

    kernel: Float[Array, "4 4 i o"]
    norm: LayerNorm

    def __init__(self, key: PRNGKeyArray, fan_in: int, fan_out: int):
        self.kernel = truncated_normal(key, (_KERNEL, _KERNEL, fan_in, fan_out))
        self.norm = LayerNorm(fan_out)

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h/2 w/2 o"]:
        x = convolve(jax.lax.conv_general_dilated, x, self.kernel, window_strides=_STRIDES, **_SAME)
        return jax.nn.silu(self.norm(x))


class Deconv(eqx.Module):
    """A transposed 4x4 convolution that doubles height and width; the last one is plain, with a bias."""

    kernel: Float[Array, "4 4 i o"]
    norm: LayerNorm | None
    bias: Float[Array, " o"] | None

    def __init__(self, key: PRNGKeyArray, fan_in: int, fan_out: int, *, plain: bool):
        self.kernel = (uniform if plain else truncated_normal)(key, (_KERNEL, _KERNEL, fan_in, fan_out))
        self.norm = None if plain else LayerNorm(fan_out)
        self.bias = jnp.zeros(fan_out) if plain else None

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n 2h 2w o"]:
        x = convolve(jax.lax.conv_transpose, x, self.kernel, strides=_STRIDES, **_SAME)
        return x + self.bias if self.norm is None else jax.nn.silu(self.norm(x))


class ImageEncoder(eqx.Module):
    """All images of an observation, stacked on channels, as one vector.

    Stride-2 convolutions of depth d, 2d, 4d, ... down to 4 x 4 pixels, flattened.
    """

    layers: tuple[Conv, ...]

    def __init__(self, key: PRNGKeyArray, side: int, channels: int, depth: int):
        sizes = [channels, *_depths(side, depth)]
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = tuple(Conv(k, i, o) for k, i, o in zip(keys, sizes, sizes[1:], strict=False))

    def __call__(self, image: Float[Array, "*n h w c"]) -> Float[Array, "*n e"]:
        x = (image - 0.5).reshape(-1, *image.shape[-3:])
        for layer in self.layers:
            x = layer(x)
        return x.reshape(*image.shape[:-3], -1)


class ImageDecoder(eqx.Module):
    """All images of an observation, stacked on channels, from a latent's `feat`; values around 0 to 1."""

    inputs: Linear
    layers: tuple[Deconv, ...]

    def __init__(self, key: PRNGKeyArray, feat: int, side: int, channels: int, depth: int):
        sizes = [*reversed(_depths(side, depth)), channels]
        key_in, *keys = jax.random.split(key, len(sizes))
        self.inputs = Linear(key_in, feat, _SMALLEST * _SMALLEST * sizes[0])
        *hidden, last = zip(keys, sizes, sizes[1:], strict=False)
        self.layers = (*(Deconv(*layer, plain=False) for layer in hidden), Deconv(*last, plain=True))

    def __call__(self, feat: Float[Array, "*n F"]) -> Float[Array, "*n h w c"]:
        x = self.inputs(feat).reshape(-1, _SMALLEST, _SMALLEST, self.layers[0].kernel.shape[2])
        for layer in self.layers:
            x = layer(x)
        return x.reshape(*feat.shape[:-1], *x.shape[1:]) + 0.5


def _depths(side: int, depth: int) -> list[int]:
    """Channels after each halving of an image of `side` pixels, down to 4."""
    halvings = (side // _SMALLEST).bit_length() - 1
    return [depth * 2**i for i in range(halvings)]


class Encoder(eqx.Module):
    """Embeds an observation: concat(images, symlog vector), each where there is one."""

    images: ImageEncoder | None
    vector: MLP | None
    image_keys: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, spec: EnvSpec, cfg: WorldModelConfig):
        key_images, key_vector = jax.random.split(key)
        self.image_keys = image_keys(spec)
        self.images, self.vector = None, None
        if self.image_keys:
            self.images = ImageEncoder(key_images, *_image_shape(spec), cfg.cnn_depth)
        if VECTOR in spec.obs:
            size = spec.obs[VECTOR].shape[0]
            self.vector = MLP(key_vector, size, cfg.encoder_units, cfg.encoder_layers)

    @property
    def size(self) -> int:
        """Length of the embedding."""
        images = 0 if self.images is None else _SMALLEST**2 * self.images.layers[-1].kernel.shape[-1]
        return images + (0 if self.vector is None else self.vector.layers[-1].linear.weight.shape[1])

    def __call__(self, obs: Obs) -> Float[Array, "*n E"]:
        parts = []
        if self.images is not None:
            parts.append(self.images(stack_images(obs, self.image_keys)))
        if self.vector is not None:
            parts.append(self.vector(symlog(obs[VECTOR])))
        return jnp.concatenate(parts, -1)


class Decoder(eqx.Module):
    """Predicts an observation from a latent's `feat`; the vector in the space it is trained in."""

    images: ImageDecoder | None
    vector: Head | None

    def __init__(self, key: PRNGKeyArray, spec: EnvSpec, cfg: WorldModelConfig, feat: int):
        key_images, key_vector = jax.random.split(key)
        self.images, self.vector = None, None
        if image_keys(spec):
            self.images = ImageDecoder(key_images, feat, *_image_shape(spec), cfg.cnn_depth)
        if VECTOR in spec.obs:
            size = spec.obs[VECTOR].shape[0]
            self.vector = Head(key_vector, feat, cfg.encoder_units, cfg.encoder_layers, size)


def image_keys(spec: EnvSpec) -> tuple[str, ...]:
    """Names of the images in an observation, in the order in which they are stacked."""
    return tuple(sorted(name for name, array in spec.obs.items() if len(array.shape) == 3))


def stack_images(obs: Obs, keys: Sequence[str]) -> Float[Array, "*n h w c"]:
    """Images on one channel axis, uint8 values scaled to 0..1."""
    return jnp.concatenate([obs[key] for key in keys], -1).astype(jnp.float32) / 255.0


def _image_shape(spec: EnvSpec) -> tuple[int, int]:
    """(side, channels of all images together)."""
    shapes = [spec.obs[key].shape for key in image_keys(spec)]
    return shapes[0][0], sum(shape[-1] for shape in shapes)
