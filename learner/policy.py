"""Policies: filter the observation into a latent, then let the actor or the planner choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from common.config import BehaviorConfig, PlannerConfig
from common.types import Policy
from learner import planner
from learner.actor_critic import Actor, Critic
from learner.cost_model import LATENT, Features, Look, SignalModel, State, learned_reward, look_away
from learner.rssm import Latent
from learner.world_model import Model


class ActingParams(NamedTuple):
    """What the learner broadcasts; None for what the acting policy does not need."""

    model: Model
    actor: Actor
    critic: Critic | None = None
    cost_critic: Critic | None = None
    multiplier: Float[Array, ""] | None = None  # on a plan's cost return


class Carry(NamedTuple):
    """Recurrent state of k environments, masked at `is_first`."""

    latent: Latent  # [k, ...]
    action: Float[Array, "k A"]
    plan: Float[Array, "k H+1 A"]  # H+1 = 0 where the actor acts


# (params, state [k], plan [k], key) -> (actions [k, A], plan [k], stats)
Choose = Callable[[ActingParams, State, Array, PRNGKeyArray], tuple[Array, Array, dict]]


def make_policy(
    choose: Choose, deter: int, stoch: int, classes: int, action_size: int, plan: int, look: Look = look_away
) -> Policy:
    """Wraps a way to choose actions into a policy over observations.

    Args:
        plan: rows of the plan in the carry; 0 for none.
        look: finds the scene that the method tracks in a state observation.
    """

    def init(count: int) -> Carry:
        latent = Latent(jnp.zeros((count, deter)), jnp.zeros((count, stoch, classes)))
        return Carry(latent, jnp.zeros((count, action_size)), jnp.zeros((count, plan, action_size)))

    def act(
        params: ActingParams,
        carry: Carry,
        obs: dict[str, Array],
        is_first: Bool[Array, " k"],
        key: PRNGKeyArray,
    ) -> tuple[Carry, Array, dict]:
        key_state, key_choice = jax.random.split(key)
        uniform = params.model.noise(key_state, is_first.shape[0])
        latent = params.model.filter(carry.latent, carry.action, is_first, obs, uniform)
        previous = jnp.where(is_first[:, None, None], 0.0, carry.plan)
        action, plan_, stats = choose(params, State(latent, look(obs)), previous, key_choice)
        action = jnp.clip(action, -1.0, 1.0)
        return Carry(latent, action, plan_), action, stats

    return Policy(init, act)


def actor_choice(*, explore: bool, features: Features = LATENT) -> Choose:
    """The actor's sample (training) or mean (evaluation)."""

    def choose(params: ActingParams, state: State, plan: Array, key: PRNGKeyArray) -> tuple:
        policy = params.actor(features.read(state))
        if not explore:
            return policy.mean, plan, {}
        return policy.sample_with(jax.random.normal(key, policy.mean.shape)), plan, {}

    return choose


def planner_choice(
    cost_model: SignalModel,
    cfg: PlannerConfig,
    behavior: BehaviorConfig,
    cost_limit: float,
    *,
    explore: bool,
    features: Features = LATENT,
    reward_model: SignalModel = learned_reward,
) -> Choose:
    """The constrained planner, vmapped over environments.

    The action is the plan's first row, with `cfg.exploration` noise on top while exploring.
    """
    proposals = int(cfg.mixture_coef * cfg.samples)

    def plan_one(params: ActingParams, state: State, previous: Array, key: PRNGKeyArray) -> planner.Plan:
        assert params.critic is not None
        key_actor, key_plan = jax.random.split(key)
        state = state._replace(latent=state.latent.by_classes())  # a plan asks for no gradient
        penalty = None
        if params.cost_critic is not None and params.multiplier is not None:
            penalty = planner.Penalty(params.cost_critic, params.multiplier)
        score = planner.model_score(
            params.model, params.critic, cost_model, state, cfg, behavior, features, penalty, reward_model
        )
        sequences = planner.actor_proposals(
            params.model, params.actor, state, proposals, cfg.horizon, key_actor, features
        )
        return planner.plan(score, planner.shift(previous), sequences, key_plan, cfg, cost_limit)

    def choose(params: ActingParams, state: State, plan: Array, key: PRNGKeyArray) -> tuple:
        key_noise, key_plan = jax.random.split(key)
        keys = jax.random.split(key_plan, plan.shape[0])
        result = jax.vmap(plan_one, in_axes=(None, 0, 0, 0))(params, state, plan, keys)
        stats = {f"plan/{name}": x.mean() for name, x in result.stats.items()}
        action = result.mean[:, 0]
        if explore and cfg.exploration:
            action = action + cfg.exploration * jax.random.normal(key_noise, action.shape)
        return action, result.mean, stats

    return choose
