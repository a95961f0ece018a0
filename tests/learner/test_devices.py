"""The same training on one and on several devices; a child process pretends to have four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from common.types import UserError
from learner.placement import place

# What runs three times is not worth optimising.
_FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "tests.learner.devices_child", str(tmp_path_factory.mktemp("checkpoints"))],
        env=os.environ | _FOUR,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_every_device_gets_its_share(compared: dict[str, Any]) -> None:
    assert compared["devices"] == 4
    assert compared["windows on each"] == [1, 1, 1, 1]


@pytest.mark.parametrize("what", ["metrics", "model", "optimizer", "actor", "critic"])
def test_training_is_equal_on_four_devices(compared: dict[str, Any], what: str) -> None:
    assert compared[what] < 1e-5


def test_a_checkpoint_of_four_devices_goes_on_with_one(compared: dict[str, Any]) -> None:
    assert compared["restored"] == 0.0
    assert compared["restored on"] == 1


def test_bfloat16_trains_on_four_devices_and_takes_over_their_checkpoint(compared: dict[str, Any]) -> None:
    assert compared["bfloat16"] < 1e-2  # sums in another order are rounded otherwise
    assert compared["restored in bfloat16"] == 0.0


def test_devices_that_cannot_share_a_batch_evenly_are_an_error(compared: dict[str, Any]) -> None:
    assert compared["uneven"] == "learner.batch_size (6) must be a multiple of the 4 learner.devices"


def test_all_devices_are_taken_for_zero() -> None:
    assert len(place(0, 4 * jax.local_device_count()).batch.device_set) == jax.local_device_count()


def test_more_devices_than_there_are_is_an_error() -> None:
    count = jax.local_device_count()
    with pytest.raises(UserError, match=f"use --learner.devices {count}"):
        place(count + 1, 16)
