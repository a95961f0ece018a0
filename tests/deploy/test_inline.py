"""Whole runs in this process, on a task that a tiny agent learns in seconds."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common import checkpoint
from common.metrics import EPISODES, METRICS
from common.sinks import read_jsonl
from common.types import UserError
from deploy import run_dir as runs
from deploy.inline import ThreadProxy
from deploy.train import train
from tests import synthetic
from tests.synthetic import COST_LIMIT, GOOD_RETURN

UNCONSTRAINED = {"safety": {"cost_model": "none", "constraint": "none"}}


@pytest.fixture(autouse=True)
def line_task(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.use_line_task(monkeypatch)


def run_of(tmp_path: Path, **changes: Any) -> tuple[Path, Any]:
    cfg = synthetic.config(**changes)
    run = runs.create(tmp_path / "run", cfg)
    return run, train(cfg, run, resume=False)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run / METRICS) if "eval/return" in row]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_pid_agent_learns_and_keeps_the_limit(tmp_path, seed):
    run, outcome = run_of(tmp_path, seed=seed)
    assert outcome.signal is None
    untrained, before, *_, last = evaluations(run)
    assert untrained["env_steps"] == 0
    assert before["eval/cost"] > 3 * COST_LIMIT  # without pressure it went to the target
    assert last["eval/cost"] < COST_LIMIT
    assert last["eval/return"] > GOOD_RETURN
    assert last["eval/return"] == outcome.summary["eval/return"]


def test_the_augmented_agent_keeps_the_limit(tmp_path):
    augmented = {"multiplier": 0.1, "penalty": 0.02, "growth": 1e-3, "cap": 2.0}
    safety = {"constraint": "augmented", "cost_limit": 0.3, "augmented": augmented}
    _, outcome = run_of(tmp_path, safety=safety)
    assert outcome.summary["eval/cost"] < COST_LIMIT
    assert outcome.summary["eval/return"] > GOOD_RETURN


def test_without_a_constraint_the_limit_is_violated(tmp_path):
    _, outcome = run_of(tmp_path, env_steps=6_000, **UNCONSTRAINED)
    assert outcome.summary["eval/cost"] > 3 * COST_LIMIT
    assert outcome.summary["eval/return"] > GOOD_RETURN
