"""A cluster of two nodes, where network namespaces can be made."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import two_nodes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_lives_on_two_nodes_and_ends_with_the_learners():
    reason = two_nodes.possible()
    if reason:
        pytest.skip(f"NOT TESTED, two nodes: {reason}")
    directory = Path(tempfile.mkdtemp(prefix="sd-", dir="/tmp"))  # sockets have short names only
    try:
        seen = two_nodes.story(directory, print)
    finally:
        shutil.rmtree(directory)
    assert "storage that all nodes share" in seen["refused"]
    assert {"learner", "replay", "inference", "actor"} <= set(seen["processes"][two_nodes.OTHER])
    assert {"metrics", "holder", "actor"} == set(seen["processes"][two_nodes.HEAD])
    assert all(steps > 0 for steps in seen["env steps of whole episodes"].values())
    assert "--resume" in seen["lost node"]["sentence"]
