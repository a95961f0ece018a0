"""Constrained cross-entropy planning for one state (OSRP, OSRP-Lag, CEM); `jax.vmap` gives the batch.

Source: SafeDreamer, alg. 1 and section 5.1, with the named deviations of ALGORITHM.md section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from common.config import BehaviorConfig, PlannerConfig
from learner.actor_critic import Actor, Critic
from learner.cost_model import LATENT, Features, SignalModel, State, follow, learned_reward, start_of
from learner.returns import lambda_return
from learner.world_model import Model


class Scores(NamedTuple):
    """What the planner knows of every candidate."""

    objective: Float[Array, " S"]  # lambda-return at the first state, less the penalty on its cost return
    return_: Float[Array, " S"]  # lambda-return at the first state
    cost: Float[Array, " S"]  # predicted costs, summed and scaled to an episode


class Penalty(NamedTuple):
    """A Lagrange multiplier on the cost lambda-return of a plan (OSRP-Lag)."""

    critic: Critic  # of costs
    multiplier: Float[Array, ""]


class Plan(NamedTuple):
    """Result of planning one decision."""

    mean: Float[Array, "H+1 A"]  # its first row is the action
    stats: dict[str, Float[Array, ""]]


# Of imagined steps. XLA writes a state over the one before, where LLVM does not vectorise; with two in
# turn, a decision at nano takes a fifth less time on a CPU.
_UNROLL = 2

Score = Callable[[Float[Array, "S H+1 A"], PRNGKeyArray], Scores]


def plan(
    score: Score,
    mean: Float[Array, "H+1 A"],
    proposals: Float[Array, "M H+1 A"],
    key: PRNGKeyArray,
    cfg: PlannerConfig,
    cost_limit: float,
) -> Plan:
    """Refines an action sequence by the cross-entropy method under a cost limit.

    Each iteration draws `cfg.samples` sequences around the mean, after the proposals, keeps
    `cfg.elites` of them (see `elite_indices`) and moves:
    mean <- m mean + (1 - m) E[elites], std <- std(elites), both weighted by
    exp(temperature (objective - best)): equally at temperature 0 (OSRP), softly above (CEM).

    With `cfg.tolerance` it ends before `cfg.iterations` once the mean has moved by less, root mean square
    over the plan (**ours**): the last decision's plan, where it starts, is often nearly right.

    Args:
        score: values candidate sequences from the present state.
        mean: last decision's plan, already shifted (zeros at the episode's start).
        proposals: sequences of the actor; M may be 0.
    """

    keys = jax.random.split(key, cfg.iterations)

    def iterate(search: _Search) -> _Search:
        key_noise, key_score = jax.random.split(keys[search.iteration])
        noise = correlated_noise(key_noise, (cfg.samples, *search.mean.shape), cfg.correlation)
        drawn = jnp.clip(search.mean + search.std * noise, -1.0, 1.0)
        candidates = jnp.concatenate([proposals, drawn])
        scores = score(candidates, key_score)
        safe = scores.cost <= cost_limit
        elites = elite_indices(scores.objective, scores.cost, safe, cfg.elites)
        weights = jax.nn.softmax(cfg.temperature * scores.objective[elites])
        center, std = _moments(candidates[elites], weights)
        mean = cfg.momentum * search.mean + (1 - cfg.momentum) * center
        stats = {
            "num_safe": safe.sum().astype(jnp.float32),
            "return": scores.return_[elites].mean(),
            "cost": scores.cost[elites].mean(),
            "std": std.mean(),
        }
        moved = jnp.sqrt(jnp.square(mean - search.mean).mean())
        return _Search(search.iteration + 1, mean, std, moved, stats)

    def unfinished(search: _Search) -> Bool[Array, ""]:
        return (search.iteration < cfg.iterations) & (search.moved > cfg.tolerance)

    std = jnp.full_like(mean, cfg.init_std)
    stats = {name: jnp.zeros(()) for name in ("num_safe", "return", "cost", "std")}
    start = _Search(jnp.zeros((), jnp.int32), mean, std, jnp.full((), jnp.inf), stats)
    if cfg.tolerance:
        end = jax.lax.while_loop(unfinished, iterate, start)
    else:
        end = jax.lax.fori_loop(0, cfg.iterations, lambda _, search: iterate(search), start)
    return Plan(end.mean, end.stats | {"iterations": end.iteration.astype(jnp.float32)})


class _Search(NamedTuple):
    """The cross-entropy method between two iterations."""

    iteration: Int[Array, ""]
    mean: Float[Array, "H+1 A"]
    std: Float[Array, "H+1 A"]
    moved: Float[Array, ""]  # the mean, root mean square of its last change
    stats: dict[str, Float[Array, ""]]


def correlated_noise(
    key: PRNGKeyArray, shape: tuple[int, ...], correlation: float
) -> Float[Array, "S H+1 A"]:
    """Standard normal noise, consecutive rows of a sequence correlated (**ours**; iCEM colours it likewise).

    n_t = rho n_{t-1} + sqrt(1 - rho^2) e_t: independent noise averages out over a plan, this leads somewhere.
    """
    noise = jax.random.normal(key, shape)
    if not correlation:
        return noise
    fresh = math.sqrt(1 - correlation**2)

    def step(last: Array, drawn: Array) -> tuple[Array, Array]:
        following = correlation * last + fresh * drawn
        return following, following

    drawn = noise.swapaxes(0, 1)
    _, later = jax.lax.scan(step, drawn[0], drawn[1:])
    return jnp.concatenate([drawn[:1], later]).swapaxes(0, 1)


def elite_indices(
    objective: Float[Array, " S"], cost: Float[Array, " S"], safe: Bool[Array, " S"], count: int
) -> Int[Array, " count"]:
    """Indices of the elites.

    With at least `count` safe candidates: those of highest objective among the safe ones. With fewer:
    the lowest costs, ties broken by objective. **Deviation**: unsafe candidates are masked, never padded
    by candidate 0, and ties in cost are broken.
    """
    best_safe = jax.lax.top_k(jnp.where(safe, objective, -jnp.inf), count)[1]
    cheapest = jnp.lexsort((-objective, cost))[:count]
    return jnp.where(safe.sum() >= count, best_safe, cheapest)


def _moments(
    elites: Float[Array, "k H+1 A"], weights: Float[Array, " k"]
) -> tuple[Float[Array, "H+1 A"], Float[Array, "H+1 A"]]:
    """Weighted mean and standard deviation over the first axis."""
    weights = weights[:, None, None]
    mean = (weights * elites).sum(0)
    return mean, jnp.sqrt((weights * jnp.square(elites - mean)).sum(0))


def shift(mean: Float[Array, "H+1 A"]) -> Float[Array, "H+1 A"]:
    """Last decision's plan, one step on; the last row is repeated."""
    return jnp.concatenate([mean[1:], mean[-1:]])


def model_score(
    model: Model,
    critic: Critic,
    cost_model: SignalModel,
    start: State,
    cfg: PlannerConfig,
    behavior: BehaviorConfig,
    features: Features = LATENT,
    penalty: Penalty | None = None,
    reward_model: SignalModel = learned_reward,
) -> Score:
    """Scores candidates by rolling the world model's prior from one state.

    objective = J_R, or J_R - multiplier J_C with both lambda-returns at the first state (OSRP-Lag).
    The summed cost is that of the H states to come; published OSRP-Vector (alone) adds the present one's,
    which no plan can change.
    """

    def score(candidates: Float[Array, "S H+1 A"], key: PRNGKeyArray) -> Scores:
        count, horizon = candidates.shape[0], cfg.horizon
        uniform = model.noise(key, horizon, count)
        # One next goal for all candidates: none must win by a luckier draw.
        origin = _repeat(start_of(model, start, jax.random.fold_in(key, 1)), count)

        def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, State]:
            following = follow(model, state, *inputs)
            return following, following

        actions = candidates.swapaxes(0, 1)[:horizon]
        _, states = jax.lax.scan(step, origin, (actions, uniform), unroll=_UNROLL)
        discount = behavior.gamma * model.cont(states.latent).mode
        feat = features.read(states)

        def first_return(signal: Array, judge: Critic) -> Float[Array, " S"]:
            return lambda_return(signal, judge.value(feat).mean, discount, behavior.lambda_)[0]

        return_ = first_return(reward_model(model, states), critic)
        cost = cost_model(model, states)
        objective = return_
        if penalty is not None:
            objective = return_ - penalty.multiplier * first_return(cost, penalty.critic)
        scale = cfg.cost_scale_length / horizon if cfg.cost_scale_length else 1.0
        return Scores(objective, return_, scale * cost.sum(0))

    return score


def actor_proposals(
    model: Model,
    actor: Actor,
    start: State,
    count: int,
    horizon: int,
    key: PRNGKeyArray,
    features: Features = LATENT,
) -> Float[Array, "M H+1 A"]:
    """Action sequences of the actor, imagined from one state; unbounded, as published (the model bounds
    every action that it is given, the policy the one that it returns)."""
    if count == 0:
        return jnp.zeros((0, horizon + 1, actor.action_size))
    key_noise, key_state = jax.random.split(key)
    noise = jax.random.normal(key_noise, (horizon + 1, count, actor.action_size))
    uniform = model.noise(key_state, horizon + 1, count)

    def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, Array]:
        noise_t, uniform_t = inputs
        action = actor(features.read(state)).sample_with(noise_t)
        return follow(model, state, action, uniform_t), action

    _, actions = jax.lax.scan(step, _repeat(start, count), (noise, uniform), unroll=_UNROLL)
    return actions.swapaxes(0, 1)


def _repeat(start: State, count: int) -> State:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), start)
