"""Constraints on the actor's objective: none, augmented Lagrangian, PID Lagrangian.

A constraint is a pair of pure updates around a small state (as optax's `init`/`update`): `on_batch` runs
inside every train step, `on_episode` once per finished training episode. `penalise` turns the reward
objective into the constrained one. Its state is part of `TrainState`, so every checkpoint holds all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.config import AugmentedConfig, PidConfig
from learner.actor_critic import Outcome, Signal

State = Any  # NamedTuple of scalars with a field `multiplier`

_DELAY = 10  # updates between the two averages whose difference is the PID's derivative
_PID_SMOOTHING = 0.95  # of the proportional and derivative terms


class Constraint(NamedTuple):
    """The interface; see the module's docstring."""

    init: Callable[[], State]
    # (state, reward objective's loss, outcome) -> loss to minimise, and the violation g of this batch
    penalise: Callable[[State, Array, Outcome], tuple[Array, Array]]
    on_batch: Callable[[State, Array], State]
    # (state, episode cost, env steps so far) -> state
    on_episode: Callable[[State, Array, Array], State]


class Unconstrained(NamedTuple):
    multiplier: Float[Array, ""]


def unconstrained() -> Constraint:
    """The actor maximises reward alone; its multiplier is 0 for ever."""
    return Constraint(
        init=lambda: Unconstrained(jnp.zeros(())),
        penalise=lambda state, loss, outcome: (loss, jnp.zeros(())),
        on_batch=lambda state, violation: state,
        on_episode=lambda state, cost, env_steps: state,
    )


class AugmentedState(NamedTuple):
    multiplier: Float[Array, ""]
    penalty: Float[Array, ""]  # c


def augmented_penalty(state: AugmentedState, violation: Float[Array, ""]) -> Float[Array, ""]:
    """psi(g) = lambda g + c/2 g^2 if lambda + c g > 0 else -lambda^2 / (2c).

    Nocedal & Wright (2006), eq. 17.65. Hand check: lambda 0.5, c 0.1, g 2 -> 1 + 0.2 = 1.2.
    """
    multiplier, c = state
    active = multiplier * violation + c / 2 * violation**2
    # c = 0 with lambda = 0 is no constraint at all, not 0 / 0.
    inactive = -(multiplier**2) / (2 * jnp.maximum(c, jnp.finfo(jnp.float32).tiny))
    return jnp.where(multiplier + c * violation > 0, active, inactive)


def augmented_update(
    state: AugmentedState, violation: Float[Array, ""], cfg: AugmentedConfig
) -> AugmentedState:
    """lambda <- clip(lambda + c g, 0, cap), c <- clip(c (1 + growth), c, 1)."""
    multiplier = jnp.clip(state.multiplier + state.penalty * violation, 0.0, cfg.cap)
    return AugmentedState(multiplier, jnp.clip(state.penalty * (1 + cfg.growth), state.penalty, 1.0))


def augmented(cfg: AugmentedConfig, cost_limit: float) -> Constraint:
    """Augmented Lagrangian on the imagined cost return (BSRP-Lag)."""

    def penalise(state: AugmentedState, loss: Array, outcome: Outcome) -> tuple[Array, Array]:
        returns = _cost(outcome).return_
        per_state = returns.sum(0) if cfg.pessimistic else returns.mean(0)
        violation = (per_state - cost_limit).mean()
        return loss + augmented_penalty(state, violation), violation

    return Constraint(
        init=lambda: AugmentedState(jnp.float32(cfg.multiplier), jnp.float32(cfg.penalty)),
        penalise=penalise,
        on_batch=lambda state, violation: augmented_update(state, violation, cfg),
        on_episode=lambda state, cost, env_steps: state,
    )


class PidState(NamedTuple):
    multiplier: Float[Array, ""]
    integral: Float[Array, ""]
    proportional: Float[Array, ""]  # smoothed error
    derivative: Float[Array, ""]  # smoothed cost
    average: Float[Array, ""]  # running episode cost J
    history: Float[Array, " delay"]  # smoothed costs of the last updates, oldest first


def pid_update(
    state: PidState, episode_cost: Array, env_steps: Array, cfg: PidConfig, cost_limit: float
) -> PidState:
    """PID control of the multiplier (Stooke et al. 2020, alg. 2), once per finished training episode.

    J <- EMA(episode cost), delta = J - b, I <- max(0, I + ki delta), P <- .95 P + .05 delta,
    S <- .95 S + .05 J, D = max(0, S - S[10 updates ago]), lambda = clip(kp P + I + kd D, 0, cap).

    Until `warmup_env_steps` only J moves and lambda is 0. **Deviation**: evaluation episodes never arrive
    here. With `anti_windup` (**ours**) the integral is bounded by the cap as well.
    """
    average = cfg.cost_decay * state.average + (1 - cfg.cost_decay) * episode_cost
    error = average - limit_at(env_steps, cfg, cost_limit)
    integral = jnp.clip(state.integral + cfg.ki * error, 0.0, cfg.cap if cfg.anti_windup else jnp.inf)
    proportional = _PID_SMOOTHING * state.proportional + (1 - _PID_SMOOTHING) * error
    derivative = _PID_SMOOTHING * state.derivative + (1 - _PID_SMOOTHING) * average
    rise = jnp.maximum(0.0, derivative - state.history[0])
    multiplier = jnp.clip(cfg.kp * proportional + integral + cfg.kd * rise, 0.0, cfg.cap)
    history = jnp.append(state.history[1:], derivative)
    moved = PidState(multiplier, integral, proportional, derivative, average, history)
    waiting = state._replace(average=average)
    return jax.tree.map(lambda a, b: jnp.where(env_steps <= cfg.warmup_env_steps, a, b), waiting, moved)


def limit_at(env_steps: Array, cfg: PidConfig, cost_limit: float) -> Float[Array, ""]:
    """The limit b after so many env steps: from `init_cost_limit` down to `cost_limit` in steps."""
    decayed = cfg.init_cost_limit - cfg.decay_limit_step * (env_steps // cfg.decay_time_step)
    return jnp.maximum(cost_limit, decayed)


def pid(cfg: PidConfig, cost_limit: float) -> Constraint:
    """PID Lagrangian on the episode cost (**ours** for an acting actor; LAPTOP: constraint).

    loss = (loss_reward + lambda mean(weight A_C)) / (1 + lambda), A_C = (cost return - cost value) / scale
    with the running spread of cost returns as scale: the multiplier weighs two advantages of like size,
    however rare costs have become.
    """

    def penalise(state: PidState, loss: Array, outcome: Outcome) -> tuple[Array, Array]:
        penalty = (outcome.weight * _cost(outcome).advantage).mean()
        multiplier = state.multiplier
        return (loss + multiplier * penalty) / (1 + multiplier), state.average - cost_limit

    return pid_penalty(cfg, cost_limit)._replace(penalise=penalise)


def pid_penalty(cfg: PidConfig, cost_limit: float) -> Constraint:
    """PID Lagrangian whose multiplier a planner uses (OSRP-Lag); the actor maximises reward alone."""

    def init() -> PidState:
        zero = jnp.zeros(())
        return PidState(zero, jnp.float32(cfg.init), zero, zero, zero, jnp.zeros(_DELAY))

    return Constraint(
        init=init,
        penalise=lambda state, loss, outcome: (loss, state.average - cost_limit),
        on_batch=lambda state, violation: state,
        on_episode=lambda state, cost, env_steps: pid_update(state, cost, env_steps, cfg, cost_limit),
    )


def _cost(outcome: Outcome) -> Signal:
    if outcome.cost is None:
        raise TypeError("a constraint needs imagined costs; see SafetyConfig.cost_model")
    return outcome.cost
