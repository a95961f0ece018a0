"""One pure training step: world model, imagination, actor, critics, constraint.

`step(state, batch, key) -> state, metrics` is jitted once with donated state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from common.config import BehaviorConfig, Config
from common.types import Batch, EnvSpec
from learner.actor_critic import Actor, Critic, Outcome, Signal, critic_loss, evaluate, imagine
from learner.cost_model import LATENT, Features, Look, SignalModel, State, learned_reward, look_away
from learner.lagrange import Constraint
from learner.policy import ActingParams
from learner.precision import compute_in
from learner.returns import Moments
from learner.scene import SceneModel
from learner.world_model import Model, WorldModel

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that training changes; a checkpoint holds all of it."""

    model: Model
    actor: Actor
    critic: Critic
    cost_critic: Critic | None
    model_opt: Any
    actor_opt: Any
    critic_opt: Any
    cost_critic_opt: Any
    moments: Moments  # of imagined reward returns
    cost_moments: Moments
    multiplier: Any  # the constraint's state
    updates: Int[Array, ""]
    bad_in_row: Int[Array, ""]  # updates skipped because something was not finite, since the last good one
    key: PRNGKeyArray


class Shared(NamedTuple):
    """What is broadcast besides world model and actor."""

    critic: bool  # a planner values the end of its plans
    penalty: bool  # its objective has a Lagrange multiplier on the cost return


@dataclass(frozen=True)
class TrainStep:
    """The trainable system: how its state starts, how it moves, what it broadcasts."""

    spec: EnvSpec
    cfg: Config
    constraint: Constraint
    cost_model: SignalModel
    learn_cost: bool  # a cost head in the world model
    value_cost: bool  # a cost critic: for a constraint, a penalty, or as the published methods have one
    shared: Shared
    features: Features = LATENT
    look: Look = look_away  # finds the scene that imagination tracks; motion is learned to do so
    reward_model: SignalModel = learned_reward

    def init(self, seed: int) -> TrainState:
        cfg = self.cfg
        key, key_model, key_actor, key_critic, key_cost = jax.random.split(jax.random.PRNGKey(seed), 5)
        model = self._world_model(key_model)
        feat = self.features.extra + model.initial().feat.shape[-1]
        actor = Actor(key_actor, feat, self.spec.action_size, cfg.behavior)
        critic = Critic(key_critic, feat, cfg.behavior, cfg.world_model)
        cost_critic = None
        if self.value_cost:
            cost_critic = Critic(key_cost, feat, cfg.behavior, cfg.world_model)
        optimizers = self._optimizers()
        return TrainState(
            model=model,
            actor=actor,
            critic=critic,
            cost_critic=cost_critic,
            model_opt=optimizers.model.init(model),
            actor_opt=optimizers.actor.init(actor),
            critic_opt=optimizers.critic.init(critic.fast),
            cost_critic_opt=None if cost_critic is None else optimizers.critic.init(cost_critic.fast),
            moments=Moments.init(),
            cost_moments=Moments.init(),
            multiplier=self.constraint.init(),
            updates=jnp.zeros((), jnp.int32),
            bad_in_row=jnp.zeros((), jnp.int32),
            key=key,
        )

    def start(self, sharding: jax.sharding.Sharding | None = None) -> TrainState:
        """`init` of the configured seed, compiled for the devices of `sharding`."""
        # To optimise a program that runs once takes longer than it saves: a start takes a third of the time.
        options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
        init = jax.jit(self.init, out_shardings=sharding, compiler_options=options)
        return init(self.cfg.seed)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Trains everything on one batch [B, T, ...]; an update that is not finite changes nothing."""
        with compute_in(self.cfg.learner.precision):
            return self._step(state, batch)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key, key_model, key_start, key_imagine = jax.random.split(state.key, 4)
        optimizers = self._optimizers()

        (_, (observed, metrics)), grads = jax.value_and_grad(type(state.model).loss, has_aux=True)(
            state.model, batch, key_model
        )
        model, model_opt, norm = optimizers.model.update(state.model, grads, state.model_opt)
        metrics["grad/model"] = norm

        start, cont = _starts(State(observed.latents, self.look(batch)), batch, self.cfg.behavior, key_start)
        (actor_loss, (outcome, moments, cost_moments, violation, more)), grads = jax.value_and_grad(
            self._actor_loss, has_aux=True
        )(state.actor, model, state, start, cont, key_imagine)
        actor, actor_opt, norm = optimizers.actor.update(state.actor, grads, state.actor_opt)
        metrics |= {"loss/actor": actor_loss, "grad/actor": norm} | more

        feat = outcome.feat[:-1]
        rate = jnp.where(state.updates == 0, 1.0, self.cfg.behavior.slow_rate)

        def train_critic(critic: Critic, opt_state: Any, signal: Signal, name: str) -> tuple[Critic, Any]:
            loss, grads = jax.value_and_grad(critic_loss)(critic, feat, signal.return_, outcome.weight)
            fast, opt_state, norm = optimizers.critic.update(critic.fast, grads.fast, opt_state)
            metrics.update({f"loss/{name}": loss, f"grad/{name}": norm})
            return critic.with_fast(fast).follow(rate), opt_state

        critic, critic_opt = train_critic(state.critic, state.critic_opt, outcome.reward, "critic")
        cost_critic, cost_critic_opt = None, None
        if state.cost_critic is not None and outcome.cost is not None:
            cost_critic, cost_critic_opt = train_critic(
                state.cost_critic, state.cost_critic_opt, outcome.cost, "cost_critic"
            )

        trained = TrainState(
            model=model,
            actor=actor,
            critic=critic,
            cost_critic=cost_critic,
            model_opt=model_opt,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            cost_critic_opt=cost_critic_opt,
            moments=moments,
            cost_moments=cost_moments,
            multiplier=self.constraint.on_batch(state.multiplier, violation),
            updates=state.updates + 1,
            bad_in_row=jnp.zeros_like(state.bad_in_row),
            key=key,
        )
        metrics["safety/multiplier"] = trained.multiplier.multiplier
        return _keep_if_finite(trained, state, key, batch, metrics)

    def acting(self, state: TrainState) -> ActingParams:
        """Parameters that a policy needs, for broadcasting."""
        return ActingParams(
            state.model,
            state.actor,
            state.critic if self.shared.critic else None,
            state.cost_critic if self.shared.penalty else None,
            state.multiplier.multiplier if self.shared.penalty else None,
        )

    def _actor_loss(
        self,
        actor: Actor,
        model: Model,
        state: TrainState,
        start: State,
        cont: Array,
        key: PRNGKeyArray,
    ) -> tuple[Array, tuple[Outcome, Moments, Moments, Array, Metrics]]:
        """-(advantage + entropy bonus) under the constraint, mean over imagined states (ALGORITHM: 2, 3)."""
        cfg = self.cfg.behavior
        imagined = imagine(model, actor, start, cfg.horizon, key, self.features)
        critics = (state.critic, state.cost_critic)
        outcome = evaluate(
            imagined, cont, model, *critics, self.cost_model, cfg, self.features, self.reward_model
        )
        moments = _follow(state.moments, outcome.reward, cfg)
        reward = outcome.reward._replace(scale=moments.scale)
        cost_moments = state.cost_moments
        if outcome.cost is not None:
            cost_moments = _follow(cost_moments, outcome.cost, cfg)
            scale = jnp.maximum(cfg.min_cost_scale, cost_moments.spread)
            outcome = outcome._replace(cost=outcome.cost._replace(scale=scale))
        objective = outcome.weight * (reward.advantage + cfg.entropy * imagined.entropy)
        loss, violation = self.constraint.penalise(state.multiplier, -objective.mean(), outcome)
        metrics = {
            "behavior/return": reward.return_.mean(),
            "behavior/value": reward.value.mean(),
            "behavior/return_scale": moments.scale,
            "behavior/entropy": imagined.entropy.mean(),
            "safety/violation": violation,
        }
        if outcome.cost is not None:
            metrics["behavior/cost_return"] = outcome.cost.return_.mean()
            metrics["behavior/cost_value"] = outcome.cost.value.mean()
            metrics["behavior/cost_scale"] = jnp.asarray(outcome.cost.scale)
        return loss, jax.lax.stop_gradient((outcome, moments, cost_moments, violation, metrics))

    def _world_model(self, key: PRNGKeyArray) -> Model:
        tracking, cfg = self.look is not look_away, self.cfg.world_model
        if tracking and not cfg.latent:
            return SceneModel(key, self.spec, cfg)
        return WorldModel(key, self.spec, cfg, learn_cost=self.learn_cost, learn_motion=tracking)

    def _optimizers(self) -> _Optimizers:
        model, behavior = self.cfg.world_model, self.cfg.behavior
        return _Optimizers(
            model=_Optimizer(model.lr, model.eps, model.clip),
            actor=_Optimizer(behavior.lr, behavior.eps, behavior.clip),
            critic=_Optimizer(behavior.lr, behavior.eps, behavior.clip),
        )


class _Optimizer:
    """Global-norm clip and Adam on the arrays of a module."""

    def __init__(self, lr: float, eps: float, clip: float):
        # Adam acts elementwise: one flat vector gives equal numbers from far fewer kernels.
        self._chain = optax.flatten(optax.chain(optax.clip_by_global_norm(clip), optax.adam(lr, eps=eps)))

    def init(self, params: Any) -> Any:
        return self._chain.init(params)

    def update(self, params: Any, grads: Any, state: Any) -> tuple[Any, Any, Array]:
        """Returns (params, state, global norm of the gradient before clipping)."""
        updates, state = self._chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.global_norm(grads)


class _Optimizers(NamedTuple):
    model: _Optimizer
    actor: _Optimizer
    critic: _Optimizer  # reward and cost critic each have a state of their own


def _starts(states: State, batch: Batch, cfg: BehaviorConfig, key: PRNGKeyArray) -> tuple[State, Array]:
    """Imagination starts [N, ...]: every posterior of the batch, or a random part of them."""
    cont = 1.0 - batch["is_terminal"].reshape(-1).astype(jnp.float32)
    flat = jax.tree.map(lambda x: jax.lax.stop_gradient(x).reshape(cont.size, *x.shape[2:]), states)
    if not 0 < cfg.imagine_starts < cont.shape[0]:
        return flat, cont
    chosen = jax.random.permutation(key, cont.shape[0])[: cfg.imagine_starts]
    return jax.tree.map(lambda x: x[chosen], flat), cont[chosen]


def _follow(moments: Moments, signal: Signal, cfg: BehaviorConfig) -> Moments:
    return moments.update(jax.lax.stop_gradient(signal.return_), cfg.moments_decay)


def _keep_if_finite(
    trained: TrainState, before: TrainState, key: PRNGKeyArray, batch: Batch, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Takes the new state only if the batch, every loss and every gradient norm are finite.

    Otherwise counts a bad update. The batch is looked at because a two-hot target hides an infinite
    reward or cost in its outermost bin.
    """
    losses = [x for name, x in metrics.items() if name.startswith(("loss/", "grad/"))]
    good = jnp.stack([jnp.isfinite(x).all() for x in (*losses, *batch.values())]).all()
    skipped = before._replace(key=key, bad_in_row=before.bad_in_row + 1)
    state = jax.tree.map(lambda new, old: jnp.where(good, new, old), trained, skipped)
    return state, metrics | {"train/bad_in_row": state.bad_in_row}
