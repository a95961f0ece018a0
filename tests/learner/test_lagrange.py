from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import AugmentedConfig, PidConfig
from learner.actor_critic import Outcome, Signal
from learner.lagrange import (
    AugmentedState,
    Constraint,
    PidState,
    augmented,
    augmented_penalty,
    augmented_update,
    limit_at,
    pid,
    unconstrained,
)

H, N = 3, 2
COSTS = np.array([[1.0, 3.0], [2.0, 1.0], [0.0, 5.0]], np.float32)  # [H, N]


# An average that is the episode's cost itself makes the terms easy to follow by hand.
PID = PidConfig(kp=0.1, ki=0.01, kd=0.01, cap=10.0, init=0.001, warmup_env_steps=100, cost_decay=0.0)


def outcome(cost: np.ndarray | None = COSTS) -> Outcome:
    zeros = jnp.zeros((H, N))
    signal = None if cost is None else Signal(jnp.array(cost), jnp.zeros((H + 1, N)))
    weight = jnp.array([[1.0, 1.0], [0.9, 0.0], [0.8, 0.0]])
    return Outcome(zeros, Signal(zeros, jnp.zeros((H + 1, N))), signal, weight)


def state(multiplier: float, penalty: float) -> AugmentedState:
    return AugmentedState(jnp.array(multiplier), jnp.array(penalty))


# --- none ---------------------------------------------------------------------------------------


def test_unconstrained_changes_nothing() -> None:
    none = unconstrained()
    start = none.init()
    loss, violation = none.penalise(start, jnp.array(3.0), outcome(None))
    assert (float(loss), float(violation), float(start.multiplier)) == (3.0, 0.0, 0.0)
    assert none.on_episode(none.on_batch(start, violation), jnp.array(50.0), jnp.array(10)) is start


# --- augmented Lagrangian -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("multiplier", "penalty", "violation", "psi"),
    [
        (0.5, 0.1, 2.0, 1.2),  # 0.5 * 2 + 0.05 * 4
        (0.5, 0.1, -1.0, -0.45),  # still active: 0.5 - 0.1 > 0
        (0.5, 0.1, -10.0, -1.25),  # inactive: -0.25 / 0.2
        (0.0, 0.1, -1.0, 0.0),
        (0.0, 0.0, -1.0, 0.0),  # no constraint at all
    ],
)
def test_augmented_penalty_by_hand(multiplier: float, penalty: float, violation: float, psi: float) -> None:
    value, slope = jax.value_and_grad(augmented_penalty, argnums=1)(state(multiplier, penalty), violation)
    assert float(value) == pytest.approx(psi, rel=1e-6)
    # d psi / dg is the multiplier that the violation will lead to.
    assert float(slope) == pytest.approx(max(0.0, multiplier + penalty * violation), rel=1e-6)


def test_augmented_sequence_by_hand() -> None:
    cfg = AugmentedConfig(multiplier=0.1, penalty=0.01, growth=0.5)
    current = augmented(cfg, cost_limit=0.0).init()
    expected = [(0.12, 0.015), (0.0, 0.0225), (0.0, 0.03375), (0.03375, 0.050625)]
    for violation, (multiplier, penalty) in zip([2.0, -100.0, -1.0, 1.0], expected, strict=True):
        current = augmented_update(current, jnp.array(violation), cfg)
        np.testing.assert_allclose(current, (multiplier, penalty), rtol=1e-5)


def test_augmented_multiplier_and_penalty_are_capped() -> None:
    cfg = AugmentedConfig(growth=1.0, cap=0.3)
    capped = augmented_update(state(0.2, 0.9), jnp.array(1.0), cfg)
    np.testing.assert_allclose(capped, (0.3, 1.0), rtol=1e-6)


@pytest.mark.parametrize(("pessimistic", "violation"), [(True, 4.0), (False, 0.0)])
def test_augmented_violation_by_hand(pessimistic: bool, violation: float) -> None:
    # Summed over the horizon: 3 and 9, mean 6; averaged: 1 and 3, mean 2. Limit 2.
    cfg = AugmentedConfig(multiplier=0.5, penalty=0.1, pessimistic=pessimistic)
    constraint = augmented(cfg, cost_limit=2.0)
    loss, g = constraint.penalise(constraint.init(), jnp.array(7.0), outcome())
    assert float(g) == pytest.approx(violation)
    assert float(loss) == pytest.approx(7.0 + 0.5 * violation + 0.05 * violation**2)
    moved = constraint.on_batch(constraint.init(), g)
    assert float(moved.multiplier) == pytest.approx(0.5 + 0.1 * violation)
    assert constraint.on_episode(moved, jnp.array(99.0), jnp.array(10**6)) is moved


@pytest.mark.parametrize("constraint", [unconstrained(), augmented(AugmentedConfig(), 2.0), pid(PID, 2.0)])
def test_updates_keep_the_shapes_of_the_state(constraint: Constraint) -> None:
    start = constraint.init()
    after_batch = constraint.on_batch(start, jnp.array(1.0))
    after_episode = constraint.on_episode(after_batch, jnp.array(3.0), jnp.array(1000))
    for after in (after_batch, after_episode):
        assert jax.tree.structure(after) == jax.tree.structure(start)
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_a_constraint_needs_costs() -> None:
    for constraint in (augmented(AugmentedConfig(), 2.0), pid(PidConfig(), 2.0)):
        with pytest.raises(TypeError, match="needs imagined costs"):
            constraint.penalise(constraint.init(), jnp.array(0.0), outcome(None))


# --- PID ----------------------------------------------------------------------------------------


def run(cfg: PidConfig, costs: list[float], limit: float = 2.0, env_steps: int = 1000) -> list[PidState]:
    constraint = pid(cfg, limit)
    update = jax.jit(constraint.on_episode)
    states = [constraint.init()]
    for cost in costs:
        states.append(update(states[-1], cost, env_steps))
    return states[1:]


def test_pid_sequence_by_hand() -> None:
    first, second = run(PID, [10.0, 4.0])
    # delta 8: I = .001 + .08, P = .05 * 8, S = .05 * 10, D = S - 0
    np.testing.assert_allclose(first[1:5], (0.081, 0.4, 0.5, 10.0), rtol=1e-5)
    assert float(first.multiplier) == pytest.approx(0.1 * 0.4 + 0.081 + 0.01 * 0.5, rel=1e-5)
    # delta 2: I = .081 + .02, P = .95 * .4 + .05 * 2, S = .95 * .5 + .05 * 4; the delayed value is still 0
    np.testing.assert_allclose(second[1:5], (0.101, 0.48, 0.675, 4.0), rtol=1e-5)
    assert float(second.multiplier) == pytest.approx(0.048 + 0.101 + 0.00675, rel=1e-5)


def test_pid_averages_episode_costs() -> None:
    averages = [float(s.average) for s in run(dataclasses.replace(PID, cost_decay=0.9), [10.0, 20.0])]
    assert averages == pytest.approx([1.0, 2.9])


def test_pid_derivative_looks_ten_updates_back() -> None:
    only_d = dataclasses.replace(PID, kp=0.0, ki=0.0, kd=1.0, init=0.0, cap=1e6)
    rising = run(only_d, [100.0] * 12)
    smooth = [100 * (1 - 0.95 ** (n + 1)) for n in range(12)]
    expected = [*smooth[:10], smooth[10] - smooth[0], smooth[11] - smooth[1]]
    np.testing.assert_allclose([float(s.multiplier) for s in rising], expected, rtol=1e-4)


def test_pid_falling_costs_are_no_reward() -> None:
    only_d = dataclasses.replace(PID, kp=0.0, ki=0.0, kd=1.0, init=0.0, cap=1e6)
    states = run(only_d, [100.0] * 10 + [0.0] * 15)
    assert float(states[9].multiplier) > 1.0
    assert float(states[-1].multiplier) == 0.0


def test_pid_waits_while_warming_up() -> None:
    (waiting,) = run(dataclasses.replace(PID, cost_decay=0.5), [10.0], env_steps=100)
    assert float(waiting.average) == 5.0
    assert float(waiting.multiplier) == 0.0
    np.testing.assert_allclose((waiting.integral, waiting.proportional, waiting.derivative), (0.001, 0, 0))
    np.testing.assert_array_equal(waiting.history, np.zeros(10))
    (moving,) = run(PID, [10.0], env_steps=101)
    assert float(moving.multiplier) > 0.0


def test_pid_does_not_wind_up() -> None:
    cfg = dataclasses.replace(PID, kp=0.0, kd=0.0, cap=0.05)
    costs = [50.0] * 30 + [0.0] * 3
    wound = run(dataclasses.replace(cfg, anti_windup=True), costs)
    assert max(float(s.multiplier) for s in wound) == pytest.approx(0.05)
    # Three good episodes of -2 each take 0.06 off the integral; the published, unbounded one still holds 14.
    assert float(wound[-1].multiplier) == 0.0
    assert all(float(s.integral) >= 0.0 for s in wound)
    published = run(cfg, costs)
    assert float(published[-1].multiplier) == pytest.approx(0.05)
    assert float(published[-1].integral) == pytest.approx(0.001 + 30 * 0.48 - 3 * 0.02, rel=1e-5)


@pytest.mark.parametrize(
    ("env_steps", "limit"), [(0, 14), (19_999, 14), (20_000, 12), (120_000, 2), (10**6, 2)]
)
def test_a_limit_decays_in_steps(env_steps: int, limit: float) -> None:
    cfg = dataclasses.replace(PID, init_cost_limit=14.0, decay_limit_step=2.0, decay_time_step=20_000)
    assert float(limit_at(jnp.asarray(env_steps), cfg, 2.0)) == limit
    assert float(limit_at(jnp.asarray(env_steps), PID, 2.0)) == 2.0
    (state,) = run(
        dataclasses.replace(cfg, kp=1.0, ki=0.0, cap=99.0, warmup_env_steps=-1), [100.0], env_steps=env_steps
    )
    assert float(state.proportional) == pytest.approx(0.05 * (100.0 - limit), rel=1e-5)


@pytest.mark.parametrize(("scale", "penalty"), [(1.0, 0.35), (0.25, 1.4)])
def test_pid_loss_by_hand(scale: float, penalty: float) -> None:
    constraint = pid(PID, 2.0)
    value = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [9.0, 9.0]], np.float32)
    loaded = constraint.init()._replace(multiplier=jnp.array(0.5), average=jnp.array(7.0))
    seen = outcome()._replace(cost=Signal(jnp.array(COSTS), jnp.array(value), scale))
    loss, violation = constraint.penalise(loaded, jnp.array(3.0), seen)
    # A_C: [0, 2], [1, 0], [-1, 4]; weighted 0 + 2 + 0.9 + 0 - 0.8 + 0 = 2.1, mean 0.35
    assert float(loss) == pytest.approx((3.0 + 0.5 * penalty) / 1.5, rel=1e-5)
    assert float(violation) == 5.0
    assert constraint.on_batch(loaded, violation) is loaded


def test_pid_pushes_costs_down() -> None:
    constraint = pid(PID, 2.0)
    loaded = constraint.init()._replace(multiplier=jnp.array(0.5))

    def loss(cost: jax.Array) -> jax.Array:
        seen = outcome()._replace(cost=Signal(cost, jnp.zeros((H + 1, N))))
        return constraint.penalise(loaded, jnp.array(0.0), seen)[0]

    expected = 0.5 / 1.5 * np.asarray(outcome().weight) / (H * N)
    np.testing.assert_allclose(jax.grad(loss)(jnp.array(COSTS)), expected, rtol=1e-5)
