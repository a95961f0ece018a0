"""Where a training step computes: data parallel over the devices of this process.

The step is the same function for any number of devices. Its batch is split, its state is not, and the
compiler adds the sums over devices that gradients and moments need (GSPMD, arXiv 2105.04663).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.types import UserError


class Placement(NamedTuple):
    """Shardings of what a training step reads and writes."""

    batch: NamedSharding  # split along the windows
    state: NamedSharding  # whole on every device


def place(devices: int, batch_size: int) -> Placement:
    """Over the first `devices` devices; 0 takes all.

    Raises UserError when there are fewer, or when they cannot share a batch evenly.
    """
    local = jax.local_devices()
    count = devices or len(local)
    if count > len(local):
        raise UserError(
            f"learner.devices is {count}, but this process has {len(local)} ({local[0].platform}); "
            f"use --learner.devices {len(local)}, or 0 for all there are"
        )
    if batch_size % count:
        raise UserError(
            f"learner.batch_size ({batch_size}) must be a multiple of the {count} learner.devices"
        )
    mesh = Mesh(local[:count], ("windows",))
    return Placement(NamedSharding(mesh, PartitionSpec("windows")), NamedSharding(mesh, PartitionSpec()))
