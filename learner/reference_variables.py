"""Puts the flat variables of the published SafeDreamer implementation into our modules.

One table pairs every published name with the place of its leaf in `TrainState`, written as
`jax.tree_util.keystr` does: `("agent/wm/rssm/gru/kernel", ".model.rssm.gru.weight")`. The helpers spell
out a layer's rows, so that the table reads like the list of the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.types import UserError
from learner.lagrange import AugmentedState
from learner.layers import MLP
from learner.train_step import TrainState
from learner.world_model import WorldModel

Convert = Callable[[np.ndarray], np.ndarray]

_BEHAVIOR = "agent/task_behavior"
_SHOWN = 8  # problems that an error message lists


class AdamMoments(NamedTuple):
    """A published optimiser's state; both mappings by the names of the variables that it trains."""

    count: int
    mu: Mapping[str, np.ndarray]
    nu: Mapping[str, np.ndarray]


class Row(NamedTuple):
    """A variable and the leaf that it, or a part of it, fills."""

    name: str
    path: str
    convert: Convert = np.asarray


class Optimizer(NamedTuple):
    """A published optimiser: the parameters that it trains, and where our state of it lies."""

    name: str  # of its scope; `{name}/state` is its Adam state, `{name}/step/value` counts its steps
    params: str  # path of the module that it trains
    state: str  # path of our state, whose moments are one flat vector over that module's leaves


def assign(
    variables: Mapping[str, np.ndarray],
    state: TrainState,
    optimizers: Mapping[str, AdamMoments] | None = None,
) -> TrainState:
    """Fills world model, actor, critics, normalisers, multiplier and counters.

    What a published checkpoint does not hold (PID state, random key) stays as in `state`, and so do the
    optimiser states without `optimizers`.

    Args:
        variables: by their published names, without the optimiser states.
        state: gives structure and shapes; may be a template from `jax.eval_shape`.
        optimizers: by their published names (`agent/wm/model_opt/state`).

    Raises:
        UserError: a variable is missing, left over, of another shape or type, or not finite.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    table = rows(state)
    steps = [f"{optimizer.name}/step/value" for optimizer in _optimizers(state)]
    steps += [f"{critic}/updates/value" for critic in _critics(state)]
    filled = {
        **_fill(table, variables, leaves, others=[*steps, *_half_precision(state)], required=steps),
        ".updates": jnp.asarray(variables[f"{_BEHAVIOR}/critic/updates/value"], jnp.int32),
    }
    if optimizers is not None:
        filled |= _fill_optimizers(optimizers, table, leaves, _optimizers(state))
    return jax.tree_util.tree_unflatten(structure, [filled.get(path, leaf) for path, leaf in leaves.items()])


def rows(state: TrainState) -> list[Row]:
    """The table for a state's structure. Raises UserError for a part that no published method has."""
    model = state.model
    if not isinstance(model, WorldModel) or model.body is not None:
        raise UserError("no published method predicts motion; use another safety.cost_model than tracked")
    table = [
        *_world_model(model),
        *_actor(state),
        *_moments(f"{_scope(state)}/retnorm_extr", ".moments"),
    ]
    for name, field in _critics(state).items():
        critic = getattr(state, field)
        table += _head(f"{name}/net", f".{field}.fast", critic.fast.mlp)
        table += _head(f"{name}/slow", f".{field}.slow", critic.slow.mlp)
    if isinstance(state.multiplier, AugmentedState):
        multiplier = f"{_scope(state)}/lagrange"
        table += _moments(f"{_scope(state)}/costnorm_extr", ".cost_moments")
        table.append(Row(f"{multiplier}/lagrange_multiplier/value", ".multiplier.multiplier"))
        table.append(Row(f"{multiplier}/penalty_multiplier/value", ".multiplier.penalty"))
    return table


def _scope(state: TrainState) -> str:
    """Of the actor: `safe_ac` where costs are modelled, `ac` otherwise."""
    unsafe = isinstance(state.model, WorldModel) and state.model.cost_head is None
    return f"{_BEHAVIOR}/{'ac' if unsafe else 'safe_ac'}"


def _critics(state: TrainState) -> dict[str, str]:
    critics = {f"{_BEHAVIOR}/critic": "critic", f"{_BEHAVIOR}/cost_critic": "cost_critic"}
    return {name: field for name, field in critics.items() if getattr(state, field) is not None}


def _optimizers(state: TrainState) -> list[Optimizer]:
    return [
        Optimizer("agent/wm/model_opt", ".model", ".model_opt"),
        Optimizer(f"{_scope(state)}/actor_opt", ".actor", ".actor_opt"),
        *(
            Optimizer(f"{name}/critic_opt", f".{field}.fast", f".{field}_opt")
            for name, field in _critics(state).items()
        ),
    ]


def _half_precision(state: TrainState) -> Iterator[str]:
    """Loss scaling of float16 runs: may be there, says nothing about the agent."""
    for optimizer in _optimizers(state):
        yield f"{optimizer.name}/grad_scale/value"
        yield f"{optimizer.name}/good_steps/value"


# --- the table ----------------------------------------------------------------------------------


def _world_model(model: WorldModel) -> Iterator[Row]:
    encoder, decoder = model.encoder, model.decoder
    if encoder.images is not None:
        for i in range(len(encoder.images.layers)):
            yield Row(f"agent/wm/enc/cnn/s{i}res/kernel", f".model.encoder.images.layers[{i}].kernel")
            yield from _norm(f"agent/wm/enc/cnn/s{i}res/norm", f".model.encoder.images.layers[{i}].norm")
    if encoder.vector is not None:
        yield from _mlp("agent/wm/enc/mlp", ".model.encoder.vector", encoder.vector)
    yield from _rssm("agent/wm/rssm", ".model.rssm", model)
    if decoder.images is not None:
        yield from _linear("agent/wm/dec/cnn/in", ".model.decoder.images.inputs")
        for i, layer in enumerate(decoder.images.layers):
            name, path = f"agent/wm/dec/cnn/s{i}res", f".model.decoder.images.layers[{i}]"
            yield Row(f"{name}/kernel", f"{path}.kernel", _swap_inputs_and_outputs)
            if layer.norm is None:
                yield Row(f"{name}/bias", f"{path}.bias")
            else:
                yield from _norm(f"{name}/norm", f"{path}.norm")
    if decoder.vector is not None:
        path = ".model.decoder.vector"
        yield from _head("agent/wm/dec/mlp", path, decoder.vector.mlp, out="dist_observation/out")
    yield from _head("agent/wm/rew", ".model.reward_head", model.reward_head.mlp)
    yield from _head("agent/wm/cont", ".model.cont_head", model.cont_head.mlp)
    if model.cost_head is not None:
        yield from _head("agent/wm/cost", ".model.cost_head", model.cost_head.mlp)


def _rssm(name: str, path: str, model: WorldModel) -> Iterator[Row]:
    deter = model.rssm.initial_deter.shape[0]
    yield Row(f"{name}/initial", f"{path}.initial_deter")
    yield from _dense(f"{name}/img_in", f"{path}.input_layer")
    yield Row(f"{name}/gru/kernel", f"{path}.gru.weight")
    yield from _norm(f"{name}/gru/norm", f"{path}.gru_norm")
    yield from _dense(f"{name}/img_out", f"{path}.prior_layer")
    yield from _linear(f"{name}/img_stats", f"{path}.prior_logits")
    # The published layer reads concat(deter, embed); ours is split between the two.
    yield Row(f"{name}/obs_out/kernel", f"{path}.post_deter.weight", lambda kernel: kernel[:deter])
    yield Row(f"{name}/obs_out/kernel", f"{path}.post_embed.weight", lambda kernel: kernel[deter:])
    yield from _norm(f"{name}/obs_out/norm", f"{path}.post_norm")
    yield from _linear(f"{name}/obs_stats", f"{path}.post_logits")


def _actor(state: TrainState) -> Iterator[Row]:
    name = f"{_scope(state)}/actor"
    yield from _mlp(name, ".actor.mlp", state.actor.mlp)
    yield from _linear(f"{name}/dist_out/out", ".actor.mean")
    yield from _linear(f"{name}/dist_out/std", ".actor.std")


def _head(name: str, path: str, mlp: MLP, out: str = "dist_out/out") -> Iterator[Row]:
    yield from _mlp(name, f"{path}.mlp", mlp)
    yield from _linear(f"{name}/{out}", f"{path}.out")


def _mlp(name: str, path: str, mlp: MLP) -> Iterator[Row]:
    for i in range(len(mlp.layers)):
        yield from _dense(f"{name}/h{i}", f"{path}.layers[{i}]")


def _dense(name: str, path: str) -> Iterator[Row]:
    yield Row(f"{name}/kernel", f"{path}.linear.weight")
    yield from _norm(f"{name}/norm", f"{path}.norm")


def _linear(name: str, path: str) -> Iterator[Row]:
    yield Row(f"{name}/kernel", f"{path}.weight")
    yield Row(f"{name}/bias", f"{path}.bias")


def _norm(name: str, path: str) -> Iterator[Row]:
    yield Row(f"{name}/scale", f"{path}.scale")
    yield Row(f"{name}/bias", f"{path}.bias")


def _moments(name: str, path: str) -> Iterator[Row]:
    yield Row(f"{name}/low/value", f"{path}.low")
    yield Row(f"{name}/high/value", f"{path}.high")


def _swap_inputs_and_outputs(kernel: np.ndarray) -> np.ndarray:
    """Transposed convolutions are published as HWOI; ours are HWIO."""
    return kernel.swapaxes(-1, -2)


# --- from the table to leaves -------------------------------------------------------------------


def _fill(
    table: Sequence[Row],
    variables: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
    others: Iterable[str] = (),
    required: Iterable[str] = (),
) -> dict[str, jax.Array]:
    """Leaves by their paths, from variables that are exactly those of the table (and `others`)."""
    given, wanted = set(variables), {row.name for row in table}
    _refuse("are missing", (wanted | set(required)) - given)
    _refuse("have no place in this method", given - wanted - set(others))
    counters = [name for name in given - wanted if not _is_number(variables[name])]
    misfits = [problem for row in table if (problem := _misfit(row, variables[row.name], leaves[row.path]))]
    _refuse("do not fit", [*misfits, *(f"{name} (not a single number)" for name in counters)])
    return {row.path: jnp.asarray(row.convert(variables[row.name]), leaves[row.path].dtype) for row in table}


def _misfit(row: Row, value: np.ndarray, leaf: Any) -> str | None:
    """What is wrong with a variable, None where it fits its leaf."""
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        return f"{row.name} (not an array of floating point numbers)"
    if value.ndim != leaf.ndim or row.convert(value).shape != leaf.shape:
        return f"{row.name} (shape {value.shape}, for {leaf.shape} in {row.path[1:]})"
    return None if np.isfinite(value).all() else f"{row.name} (not finite)"


def _is_number(value: Any) -> bool:
    return np.shape(value) == () and np.issubdtype(np.asarray(value).dtype, np.number)


def _fill_optimizers(
    states: Mapping[str, AdamMoments],
    table: Sequence[Row],
    leaves: Mapping[str, Any],
    optimizers: Iterable[Optimizer],
) -> dict[str, jax.Array]:
    ours = {f"{optimizer.name}/state": optimizer for optimizer in optimizers}
    _refuse("are missing", ours.keys() - states.keys())
    _refuse("have no place in this method", states.keys() - ours.keys())
    filled = {}
    for name, optimizer in ours.items():
        params = {path: leaf for path, leaf in leaves.items() if path.startswith(optimizer.params + ".")}
        trained = [row for row in table if row.path in params]
        fields = {path.rsplit(".")[-1]: path for path in leaves if path.startswith(optimizer.state + "[")}
        filled[fields["count"]] = jnp.asarray(states[name].count, jnp.int32)
        for moment in ("mu", "nu"):
            values = _fill(trained, getattr(states[name], moment), params)
            filled[fields[moment]] = jnp.concatenate([values[path].ravel() for path in params])
    return filled


def _refuse(what: str, names: Iterable[str]) -> None:
    """Raises UserError if there are any names."""
    names = sorted(set(names))
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UserError(f"published variables that {what}: {', '.join(names[:_SHOWN])}{more}")
