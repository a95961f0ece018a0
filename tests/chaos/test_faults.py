"""One run under Ray whose parts are killed or stopped one after another, then its driver, then resumed.

What survives what: a test per row of the README's table.
"""

from __future__ import annotations

import json
from typing import Any

import faults
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("faults")
    figures = faults.story(directory, print)
    (directory / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


@pytest.mark.parametrize(
    "part", ["actor", "inference", "evaluator", "metrics", "holder", "replay", "learner"]
)
def test_a_killed_part_comes_back(figures, part):
    assert figures[f"killed {part}"]["seconds"] < faults.PATIENCE


@pytest.mark.parametrize("part", ["actor", "replay"])
def test_a_stuck_part_is_replaced_after_the_grace(figures, part):
    assert faults.GRACE < figures[f"stuck {part}"]["seconds"] < faults.PATIENCE


def test_what_a_killed_part_had_not_saved_is_counted(figures):
    assert figures["killed learner"]["lost_updates"] > 0
    assert figures["killed replay"]["lost_steps"] > 0


def test_actors_go_on_while_the_learner_is_away(figures):
    assert figures["killed learner"]["env_steps_meanwhile"] > 0


def test_a_full_disk_costs_checkpoints_only(figures):
    assert figures["full disk"]["seconds"] < faults.PATIENCE


def test_nothing_outlives_a_killed_driver(figures):
    assert figures["killed driver"]["seconds"] < 60


def test_the_run_is_resumed_from_the_checkpoint_before_a_truncated_one(figures):
    assert figures["passed over"]
    assert figures["resumed"]["exit_code"] == 0


def test_the_train_ratio_returns_to_its_target(figures):
    assert figures["resumed"]["train_ratio"] == pytest.approx(faults.TRAIN_RATIO, rel=0.2)


def test_counters_never_fall_and_no_window_mixes_two_streams(figures):
    assert figures["problems"] == []
