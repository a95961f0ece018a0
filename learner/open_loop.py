"""What a world model predicts without looking: it watches the first steps of a sequence, then only acts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.types import VECTOR, Batch
from learner.cost_model import Look, SignalModel, State, follow, learned_reward
from learner.rssm import Latent
from learner.scene import Scene, SceneModel
from learner.world_model import Model, WorldModel


class Prediction(NamedTuple):
    """What the model makes of every step: seen and filtered up to `context`, imagined from there on."""

    reward: Float[Array, "B T"]  # per agent step
    cost: Float[Array, "B T"]  # as the cost model counts it
    hazards: Float[Array, "B T objects 2"] | None  # tracked, egocentric (m); None where `look` finds no scene
    vector: Float[Array, "B T O"] | None  # decoded, in the environment's units; None without one
    images: dict[str, Float[Array, "B T h w c"]]  # decoded, values around 0 to 1


@partial(jax.jit, static_argnames=("cost_model", "look", "context", "reward_model"))
def open_loop(
    model: Model,
    cost_model: SignalModel,
    look: Look,
    batch: Batch,
    context: int,
    reward_model: SignalModel = learned_reward,
) -> Prediction:
    """Filters the first `context` steps of sequences, then imagines the others under their true actions.

    Latents are modes, rewards and costs means of their distributions: nothing is drawn at random. A tracked
    scene is the one that was seen at the last filtered step, moved by the model; rewards of the steps before
    it are predicted from one step to the next.

    Args:
        batch: whole sequences [B, T, ...] without an episode's border inside; `action[:, t]` was chosen at
            step t and leads to t + 1.
        context: at least 1.
    """
    seen = {name: batch[name][:, :context] for name in model.obs_keys}
    start = State(_filter(model, seen, batch["action"]), _rewarded(model, look(seen), batch["action"]))
    last = jax.tree.map(lambda x: x[:, -1], start)
    imagined = _imagine(model, last, batch["action"][:, context - 1 : -1])
    states = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), start, imagined)
    vector, images = None, {}
    if isinstance(model, WorldModel):
        vector = model.decode_vector(states.latent) if model.decoder.vector is not None else None
        images = model.decode_images(states.latent)
    hazards = None
    if states.scene is not None and model.body is not None:
        hazards = states.scene.obstacles[..., : model.body.layout.hazards, :]
    return Prediction(reward_model(model, states), cost_model(model, states), hazards, vector, images)


def _rewarded(model: Model, scene: Scene | None, action: Float[Array, "B T A"]) -> Scene | None:
    """Scenes [B, context, ...] that were seen, with the rewards predicted for arriving there."""
    if scene is None or model.body is None:
        return scene
    before = jax.tree.map(lambda x: x[:, :-1], scene)
    moved = model.body.move(before, action[:, : scene.reward.shape[1] - 1])
    return scene._replace(reward=scene.reward.at[:, 1:].set(moved.reward))


def _filter(model: Model, obs: dict[str, Array], action: Float[Array, "B T A"]) -> Latent:
    """Posterior modes [B, context, ...] from the initial state."""
    if isinstance(model, SceneModel):
        return model.initial(*obs[VECTOR].shape[:2])
    rssm, embed = model.rssm, model.encode(obs)
    size, length = embed.shape[:2]
    previous = jnp.concatenate([jnp.zeros_like(action[:, :1]), action[:, : length - 1]], 1)
    is_first = jnp.zeros((size, length), bool).at[:, 0].set(True)

    def step(latent: Latent, inputs: tuple[Array, Array, Array]) -> tuple[Latent, Latent]:
        latent = rssm.obs_step(latent, *inputs, uniform=None)
        return latent, latent

    return _scan(step, rssm.initial(size), (previous, is_first, embed))


def _imagine(model: Model, start: State, action: Float[Array, "B H A"]) -> State:
    """Prior modes and tracked scenes [B, H, ...] after each of the actions."""

    def step(state: State, action: Array) -> tuple[State, State]:
        state = follow(model, state, action, uniform=None)
        return state, state

    return _scan(step, start, action)


def _scan(step: Callable, start: Any, inputs: Any) -> Any:
    """What `step` gives along the second axis of the inputs."""
    _, states = jax.lax.scan(step, start, _swapped(inputs))
    return _swapped(states)


def _swapped(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
