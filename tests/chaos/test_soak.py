"""Three minutes in which a random part of a run is killed every twenty seconds; see tools/soak.py.

With the replay that the faults of test_faults.py do not meet where there is Reverb.
"""

from __future__ import annotations

import pytest
import soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_run_that_loses_a_part_again_and_again_is_right_in_the_end(tmp_path):
    result = soak.soak(tmp_path, seconds=180.0, every=20.0, replay="memory")
    assert sum(result["kills"].values()) >= 5  # a part that is not back yet is waited for
    assert result["problems"] == []
