"""Who gets which share of the GPUs."""

from __future__ import annotations

import pytest

from common.types import UserError
from deploy.accelerators import shares


@pytest.mark.parametrize(
    ("there", "devices", "central", "expected"),
    [
        (0, 1, False, (0, 0, 0)),
        (0, 0, True, (0, 0, 0)),
        (1, 1, False, (1, 0, 0)),
        (1, 2, False, (1, 0, 0)),
        (4, 1, False, (1, 0, 0)),
        (4, 0, False, (4, 0, 0)),
        (1, 1, True, (0.4, 0.4, 0.2)),
        (1, 0, True, (0.4, 0.4, 0.2)),
        (2, 1, True, (1, 0.6, 0.4)),
        (4, 0, True, (3, 0.6, 0.4)),
    ],
)
def test_shares(there, devices, central, expected):
    found = shares(there, devices, central)
    assert found == expected
    assert sum(found) <= there
    assert all(share in (0, 1) or share < 1 or share.is_integer() for share in map(float, found))


def test_a_learner_that_takes_all_cards_leaves_none_to_a_server():
    with pytest.raises(UserError, match=r"--learner.devices 1, or --inference.mode local"):
        shares(2, 2, True)
