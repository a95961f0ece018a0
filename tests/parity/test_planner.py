"""Choice of elites and the plan's update, on recorded returns and costs of 40 candidates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import PlannerConfig
from learner import planner
from learner.planner import Plan, Scores, plan
from tests.parity.published import padded_elites
from tests.parity.recorded import System, assert_close

KEY = jax.random.PRNGKey(0)
CFG = PlannerConfig(samples=0, elites=8, iterations=1, horizon=5)


def planned(recorded: dict[str, Any], limit: float = 2.0) -> Plan:
    """One iteration whose candidates are the recorded ones."""
    proposals = jnp.asarray(recorded["actions"].swapaxes(0, 1))
    scores = Scores(*(jnp.asarray(recorded[name]) for name in ("ret", "ret", "cost")))
    return plan(lambda candidates, key: scores, jnp.asarray(recorded["mean0"]), proposals, KEY, CFG, limit)


def case(pid: System, name: str) -> dict[str, Any]:
    return pid.group("elite") | pid.group(f"elite/{name}")


def assert_equal(ours: Plan, recorded: dict[str, Any]) -> None:
    assert_close(ours.mean, recorded["mean"], name="mean")
    assert_close(ours.stats["std"], recorded["std"].mean(), name="std")
    assert ours.stats["num_safe"] == recorded["num_safe"]


@pytest.mark.parametrize("name", ["safe_many", "unsafe_few", "all_safe", "pad0_unsafe_low"])
def test_elites_and_update(pid: System, name: str) -> None:
    """Many, few and only safe candidates; in the last case the unsafe candidate 0 is poor."""
    recorded = case(pid, name)
    assert_equal(planned(recorded), recorded)


@pytest.mark.parametrize("name", ["pad0_safe_high", "pad0_unsafe_high"])
def test_deviation_masked_instead_of_padded(pid: System, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: the list of safe candidates is filled up with candidate 0, which is then elected again
    and again (recorded std: 0), or although it is unsafe. Ours: eight different safe ones."""
    recorded = case(pid, name)
    ours = planned(recorded)
    safe = np.flatnonzero(recorded["cost"] <= 2.0)
    best = safe[np.argsort(-recorded["ret"][safe])[:8]]
    assert (0 in best) == (name == "pad0_safe_high")
    assert np.abs(np.asarray(ours.mean) - recorded["mean"]).max() > 0.1
    elected = recorded["actions"][:, best]
    assert_close(ours.mean, 0.1 * recorded["mean0"] + 0.9 * elected.mean(1))
    assert_close(ours.stats["std"], elected.std(1).mean())
    # The padding is the whole difference.
    monkeypatch.setattr(planner, "elite_indices", padded_elites)
    assert_equal(planned(recorded), recorded)


def test_deviation_cost_at_the_limit_is_safe() -> None:
    """Published: J_C < b, so that a limit of 0 calls no plan safe. Ours: J_C <= b."""
    rng = np.random.default_rng(0)
    recorded = {
        "actions": rng.uniform(-1, 1, (6, 40, 2)).astype(np.float32),
        "mean0": np.zeros((6, 2), np.float32),
        "ret": rng.normal(size=40).astype(np.float32),
        "cost": np.repeat([0.0, 1.0], 20).astype(np.float32),
    }
    ours = planned(recorded, limit=0.0)
    assert ours.stats["num_safe"] == 20
    best = np.argsort(-recorded["ret"][:20])[:8]
    assert_close(ours.mean, 0.9 * recorded["actions"][:, best].mean(1))


def test_deviation_ties_in_cost_go_to_the_higher_return() -> None:
    """Published: among equal costs the first candidate drawn wins. Ours: the highest return."""
    rng = np.random.default_rng(1)
    recorded = {
        "actions": rng.uniform(-1, 1, (6, 40, 2)).astype(np.float32),
        "mean0": np.zeros((6, 2), np.float32),
        "ret": np.arange(40, dtype=np.float32),
        "cost": np.full(40, 3.0, np.float32),
    }
    assert_close(planned(recorded).mean, 0.9 * recorded["actions"][:, -8:].mean(1))
