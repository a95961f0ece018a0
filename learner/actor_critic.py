"""Imagination, actor, and one critic for reward and cost (ALGORITHM: section 2)."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from common.config import BehaviorConfig, WorldModelConfig
from learner.cost_model import LATENT, Features, SignalModel, State, follow, learned_reward, start_of
from learner.distributions import BoundedNormal, TwoHot
from learner.layers import MLP, Head, Inputs, Linear
from learner.returns import lambda_return, trajectory_weight
from learner.world_model import Model


class Actor(eqx.Module):
    mlp: MLP
    mean: Linear
    std: Linear

    def __init__(self, key: PRNGKeyArray, feat: int, action_size: int, cfg: BehaviorConfig):
        key_mlp, key_mean, key_std = jax.random.split(key, 3)
        self.mlp = MLP(key_mlp, feat, cfg.units, cfg.layers)
        self.mean = Linear(key_mean, cfg.units, action_size)
        self.std = Linear(key_std, cfg.units, action_size)

    @property
    def action_size(self) -> int:
        return self.mean.weight.shape[1]

    def __call__(self, feat: Inputs) -> BoundedNormal:
        x = self.mlp(feat)
        return BoundedNormal.from_raw(self.mean(x), self.std(x))


class Critic(eqx.Module):
    """Two-hot value of a latent and a slow copy that regularises it."""

    fast: Head
    slow: Head
    bins: int = eqx.field(static=True)
    bin_range: float = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, feat: int, cfg: BehaviorConfig, model: WorldModelConfig):
        self.fast = Head(key, feat, cfg.units, cfg.layers, model.bins, outscale=0.0)
        self.slow = jax.tree.map(jnp.copy, self.fast)
        self.bins, self.bin_range = model.bins, model.bin_range

    def value(self, feat: Inputs) -> TwoHot:
        return self._two_hot(self.fast, feat)

    def slow_value(self, feat: Inputs) -> TwoHot:
        return self._two_hot(self.slow, feat)

    def with_fast(self, fast: Head) -> Critic:
        return eqx.tree_at(lambda c: c.fast, self, fast)

    def follow(self, rate: float | Float[Array, ""]) -> Critic:
        """Moves the slow copy by `rate` of the way."""
        slow = jax.tree.map(lambda s, f: s + rate * (f - s), self.slow, self.fast)
        return eqx.tree_at(lambda c: c.slow, self, slow)

    def _two_hot(self, head: Head, feat: Inputs) -> TwoHot:
        return TwoHot(head(feat), jnp.linspace(-self.bin_range, self.bin_range, self.bins))


def critic_loss(
    critic: Critic, feat: Float[Array, "H N F"], target: Float[Array, "H N"], weight: Float[Array, "H N"]
) -> Float[Array, ""]:
    """-log p(R) - log p(slow mean), weighted (DreamerV3, eq. 8 and its regulariser)."""
    value = critic.value(feat)
    slow = jax.lax.stop_gradient(critic.slow_value(feat).mean)
    return -(weight * (value.log_prob(target) + value.log_prob(slow))).mean()


class Imagined(NamedTuple):
    """A rollout of the prior under the actor; states 0..H, actions chosen at 0..H-1."""

    states: State  # [H+1, N, ...]
    entropy: Float[Array, "H N"]  # of the actor at states 0..H-1


def imagine(
    model: Model,
    actor: Actor,
    start: State,
    horizon: int,
    key: PRNGKeyArray,
    features: Features = LATENT,
) -> Imagined:
    """Rolls the prior `horizon` steps from N start states; differentiable in the actor's parameters."""
    key_action, key_state = jax.random.split(key)
    count = start.latent.deter.shape[0]
    noise = jax.random.normal(key_action, (horizon, count, actor.action_size))
    uniform = model.noise(key_state, horizon, count)

    start = start_of(model, start, jax.random.fold_in(key, 1), (count,))

    def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, tuple[State, Array]]:
        noise_t, uniform_t = inputs
        policy = actor(jax.lax.stop_gradient(features.read(state)))
        following = follow(model, state, policy.sample_with(noise_t), uniform_t)
        return following, (following, policy.entropy())

    _, (states, entropy) = jax.lax.scan(step, start, (noise, uniform))
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)
    return Imagined(states, entropy)


class Signal(NamedTuple):
    """Returns of one signal (reward or cost) along imagined trajectories."""

    return_: Float[Array, "H N"]
    value: Float[Array, "H+1 N"]
    scale: Float[Array, ""] | float = 1.0  # by which advantages are divided

    @property
    def advantage(self) -> Float[Array, "H N"]:
        """(R - v) / scale."""
        return (self.return_ - self.value[:-1]) / self.scale


class Outcome(NamedTuple):
    """An imagined rollout, valued. `cost` is None for methods without a cost."""

    feat: Float[Array, "H+1 N F"]  # what the critics read
    reward: Signal
    cost: Signal | None
    weight: Float[Array, "H N"]


def evaluate(
    imagined: Imagined,
    start_cont: Float[Array, " N"],
    model: Model,
    critic: Critic,
    cost_critic: Critic | None,
    cost_model: SignalModel,
    cfg: BehaviorConfig,
    features: Features = LATENT,
    reward_model: SignalModel = learned_reward,
) -> Outcome:
    """Lambda-returns of reward and cost with the critics' means as values.

    Args:
        start_cont: 1 - is_terminal of the start states; later states use the mode of the continue head.
    """
    states = imagined.states
    feat = features.read(states)
    following = jax.tree.map(lambda x: x[1:], states)
    cont = jnp.concatenate([start_cont[None], model.cont(following.latent).mode])
    cont = jax.lax.stop_gradient(cont)

    def signal(predicted: Array, judge: Critic, gamma: float) -> Signal:
        # The part that `critic_loss` needs, too: in two pieces, XLA computes it once for both.
        value = jnp.concatenate([judge.value(feat[:-1]).mean, judge.value(feat[-1:]).mean])
        return Signal(lambda_return(predicted, value[1:], gamma * cont[1:], cfg.lambda_), value)

    reward = signal(reward_model(model, following), critic, cfg.gamma)
    cost = None
    if cost_critic is not None:
        cost = signal(cost_model(model, following), cost_critic, cfg.cost_gamma or cfg.gamma)
    return Outcome(feat, reward, cost, trajectory_weight(cont, cfg.gamma)[:-1])
