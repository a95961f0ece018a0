"""Multipliers along the recorded sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import AugmentedConfig, PidConfig
from learner.lagrange import (
    AugmentedState,
    PidState,
    augmented,
    augmented_penalty,
    limit_at,
    pid_penalty,
    pid_update,
)
from tests.parity.recorded import System, assert_close

LIMIT = 2.0


# --- augmented Lagrangian -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "multiplier", "penalty", "limit"),
    [("default", 1e-6, 5e-9, 2.0), ("big", 0.1, 0.01, 2.0), ("zero_limit", 0.1, 0.01, 25.0)],
)
def test_augmented_lagrangian_sequence(
    augmented_rows: dict, augmented: System, name: str, multiplier: float, penalty: float, limit: float
) -> None:
    cfg = augmented.cfg.safety.augmented
    state = AugmentedState(jnp.asarray(multiplier), jnp.asarray(penalty))
    update = jax.jit(partial(_augmented_step, limit=limit, cfg=cfg))
    for cost, row in zip(augmented_rows["inputs"], augmented_rows[name], strict=True):
        psi, slope, spread, state = update(state, cost)
        assert_close(psi, row[0], terms=abs(multiplier), name="psi")
        assert_close([state.multiplier, state.penalty], row[1:3], name="multipliers")
        assert_close(slope, row[3], name="gradient")
        assert spread < 1e-6 * max(row[3], 1e-6)  # every return weighs the same, as recorded
        assert row[4] == 0


@pytest.fixture(scope="module")
def augmented_rows(augmented: System) -> dict:
    return augmented.group("lagrange")


def _augmented_step(
    state: AugmentedState, cost: jax.Array, *, limit: float, cfg: AugmentedConfig
) -> tuple[jax.Array, jax.Array, jax.Array, AugmentedState]:
    """psi, the sum and the spread of its gradient with respect to every return, and the next state."""

    def psi(cost: jax.Array) -> jax.Array:
        return augmented_penalty(state, (cost - limit).mean())

    value, gradient = jax.value_and_grad(psi)(cost)
    following = augmented(cfg, limit).on_batch(state, (cost - limit).mean())
    return value, gradient.sum(), gradient.max() - gradient.min(), following


# --- PID ----------------------------------------------------------------------------------------


def controller(cfg: PidConfig, limit: float) -> tuple[PidConfig, Callable]:
    """The controller as recorded without its average: it sees every episode's own cost at once."""
    raw = dataclasses.replace(cfg, cost_decay=0.0, warmup_env_steps=-1)
    return raw, jax.jit(partial(pid_update, cfg=raw, cost_limit=limit))


@pytest.mark.parametrize(
    ("name", "changes", "limit"),
    [
        ("osrp_lag", {}, LIMIT),
        ("defaults", {"kp": 0.0, "ki": 0.1, "kd": 0.0, "cap": 100.0}, 25.0),
        ("defaults_limit2", {"kp": 0.0, "ki": 0.1, "kd": 0.0, "cap": 100.0}, LIMIT),
        ("decay", {"init_cost_limit": 14.0}, LIMIT),
    ],
)
def test_pid_sequence(pid: System, name: str, changes: dict, limit: float) -> None:
    cfg, update = controller(dataclasses.replace(pid.cfg.safety.pid, **changes), limit)
    state: PidState = pid_penalty(cfg, limit).init()
    rows = pid.recorded[f"pid/{name}"]
    steps = pid.recorded["pid/steps"] if name == "decay" else np.arange(10)
    for step, cost, row in zip(steps, pid.recorded["pid/ep_costs"], rows, strict=True):
        state = update(state, cost, step)
        ours = [state.multiplier, state.derivative, state.integral, state.proportional]
        assert_close([*ours, limit_at(step, cfg, limit)], row)


def test_pid_in_the_loop_of_episodes(pid: System) -> None:
    """With the average of episode costs and the warm-up, as the published training loop runs it."""
    constraint = pid.train.constraint
    state: PidState = constraint.init()
    update = jax.jit(constraint.on_episode)
    for step, cost, average, multiplier, proportional, integral, derivative in pid.recorded["pid/loop"]:
        state = update(state, cost, step)
        ours = [state.average, state.multiplier, state.proportional, state.integral, state.derivative]
        assert_close(ours, [average, multiplier, proportional, integral, derivative])


def test_preset_has_the_recorded_gains(pid: System) -> None:
    cfg = pid.cfg.safety
    gains = (cfg.pid.kp, cfg.pid.ki, cfg.pid.kd, cfg.pid.cap, cfg.pid.init, cfg.pid.warmup_env_steps)
    assert gains == (0.1, 0.01, 0.01, 0.1, 0.001, 5000)
    assert cfg.cost_limit == LIMIT
