"""Big arrays of a step, above all camera frames, compressed without loss to less than half of their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cramjam
import numpy as np


class Frames(NamedTuple):
    """Compressed arrays of equal shape, one behind the other."""

    data: np.ndarray  # uint8 [bytes of all]
    sizes: np.ndarray  # int64 [number], bytes of each


def compress(array: np.ndarray) -> bytes:
    """One array as an LZ4 block; its size and shape must be known to whoever reads it."""
    return bytes(cramjam.lz4.compress_block(np.ascontiguousarray(array).data, store_size=False))


def joined(blocks: Sequence[bytes]) -> Frames:
    """Blocks made by `compress`, to be sent or stored together."""
    return Frames(np.frombuffer(b"".join(blocks), np.uint8), np.array([len(each) for each in blocks]))


def split(frames: Frames) -> list[bytes]:
    """What `joined` put together."""
    ends = np.cumsum(frames.sizes)
    sizes = frames.sizes.tolist()
    return [frames.data[end - size : end].tobytes() for end, size in zip(ends.tolist(), sizes, strict=True)]


def decompress(frames: Frames, out: np.ndarray) -> None:
    """Fills `out` [number, ...], which is contiguous. Raises ValueError for what is no such frame."""
    data, end = frames.data.data, 0
    for size, array in zip(frames.sizes.tolist(), out, strict=True):
        begin, end = end, end + size
        target: Any = array.reshape(-1).view(np.uint8)
        try:
            found = cramjam.lz4.decompress_block_into(data[begin:end], target, output_len=len(target))
        except cramjam.DecompressionError as error:
            raise ValueError(f"no compressed frame: {error}") from None
        if found != len(target):
            raise ValueError(f"a compressed frame has {found} bytes instead of {len(target)}")
