"""What a world model predicts without looking: it watches the first steps of a sequence, then only acts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.types import Batch
from learner.cost_model import CostModel, Look, State, move
from learner.rssm import Latent
from learner.world_model import WorldModel


class Prediction(NamedTuple):
    """What the model makes of every step: seen and filtered up to `context`, imagined from there on."""

    reward: Float[Array, "B T"]  # per agent step
    cost: Float[Array, "B T"]  # as the cost model counts it
    hazards: Float[Array, "B T objects 2"] | None  # tracked, egocentric (m); None where `look` finds none
    vector: Float[Array, "B T O"] | None  # decoded, in the environment's units; None without one
    images: dict[str, Float[Array, "B T h w c"]]  # decoded, values around 0 to 1


@partial(jax.jit, static_argnames=("cost_model", "look", "context"))
def open_loop(model: WorldModel, cost_model: CostModel, look: Look, batch: Batch, context: int) -> Prediction:
    """Filters the first `context` steps of sequences, then imagines the others under their true actions.

    Latents are modes, rewards and costs means of their distributions: nothing is drawn at random. Tracked
    hazards are those that were seen at the last filtered step, moved by the model.

    Args:
        batch: whole sequences [B, T, ...] without an episode's border inside; `action[:, t]` was chosen at
            step t and leads to t + 1.
        context: at least 1.
    """
    obs = {name: batch[name] for name in model.obs_keys}
    seen = {name: x[:, :context] for name, x in obs.items()}
    filtered = _filter(model, seen, batch["action"])
    hazards = look(seen)
    last = jax.tree.map(lambda x: x[:, -1], State(filtered, hazards))
    imagined = _imagine(model, last, batch["action"][:, context - 1 : -1])
    states = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), State(filtered, hazards), imagined)
    return Prediction(
        model.reward(states.latent).mean,
        cost_model(model, states),
        states.hazards,
        model.decode_vector(states.latent) if model.decoder.vector is not None else None,
        model.decode_images(states.latent),
    )


def _filter(model: WorldModel, obs: dict[str, Array], action: Float[Array, "B T A"]) -> Latent:
    """Posterior modes [B, context, ...] from the initial state."""
    rssm, embed = model.rssm, model.encode(obs)
    size, length = embed.shape[:2]
    previous = jnp.concatenate([jnp.zeros_like(action[:, :1]), action[:, : length - 1]], 1)
    is_first = jnp.zeros((size, length), bool).at[:, 0].set(True)

    def step(latent: Latent, inputs: tuple[Array, Array, Array]) -> tuple[Latent, Latent]:
        latent = rssm.obs_step(latent, *inputs, uniform=None)
        return latent, latent

    return _scan(step, rssm.initial(size), (previous, is_first, embed))


def _imagine(model: WorldModel, start: State, action: Float[Array, "B H A"]) -> State:
    """Prior modes and tracked hazards [B, H, ...] after each of the actions."""

    def step(state: State, action: Array) -> tuple[State, State]:
        latent = model.rssm.img_step(state.latent, action, uniform=None)
        state = State(latent, move(model, state.hazards, latent))
        return state, state

    return _scan(step, start, action)


def _scan(step: Callable, start: Any, inputs: Any) -> Any:
    """What `step` gives along the second axis of the inputs."""
    _, states = jax.lax.scan(step, start, _swapped(inputs))
    return _swapped(states)


def _swapped(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
