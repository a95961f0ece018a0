"""What a configuration may not ask for, whatever its types say."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable

from common.config import Config
from common.configuration import did_you_mean, flatten, load, presets, to_dict
from common.types import UserError
from common.untrusted import shown


def check(config: Config) -> None:
    """Refuses combinations that cannot work. Raises UserError with the first one found."""
    for problem in _problems(config):
        raise UserError(problem)


def unread(config: Config) -> list[str]:
    """Settings that differ from the presets of the run although nothing reads them."""
    if config.world_model.latent:
        return []
    preset = load(config.method, config.size, config.task, observation=config.env.observation).world_model
    changed = (name for name in OF_LATENT if getattr(config.world_model, name) != getattr(preset, name))
    return [f"world_model.{name}" for name in changed]


def _problems(config: Config) -> Iterable[str]:
    yield from _not_positive(config)
    learner, planner, safety = config.learner, config.planner, config.safety
    for kind, name in (("method", config.method), ("size", config.size)):
        if name not in presets(kind):
            yield f"there is no {kind} `{shown(name)}`{did_you_mean(shown(name), presets(kind))}"
    if planner.elites > planner.samples:
        yield f"planner.elites ({planner.elites}) must not exceed planner.samples ({planner.samples})"
    window, capacity = learner.batch_length, config.replay.capacity
    if window * learner.batch_size > capacity:
        yield f"a batch ({learner.batch_size} x {window} steps) does not fit replay.capacity ({capacity})"
    shards = config.replay.shards
    if config.actors.count < shards:
        yield f"replay.shards ({shards}) must not exceed actors.count ({config.actors.count})"
    if learner.batch_size % shards:
        yield f"learner.batch_size ({learner.batch_size}) must be a multiple of replay.shards ({shards})"
    if config.inference.max_batch < config.actors.envs:
        yield (
            f"inference.max_batch ({config.inference.max_batch}) must not be below actors.envs "
            f"({config.actors.envs}): the environments of an actor are decided for together"
        )
    if config.replay.stride > window:
        yield (
            f"replay.stride ({config.replay.stride}) must not exceed learner.batch_length ({window}): "
            "steps between two windows would never be replayed"
        )
    if config.replay.host != "auto" and not _is_address(config.replay.host):
        host = shown(config.replay.host)
        yield f"`replay.host` must be auto, an IP address, or 0.0.0.0 for all, not {host}"
    if learner.train_ratio * config.replay.stride / window < 1e-3:
        yield f"learner.train_ratio ({learner.train_ratio}) is too small to train at all"
    if safety.constraint != "none" and safety.cost_model == "none":
        yield f"safety.constraint {safety.constraint} needs costs: safety.cost_model learned or geometric"
    if safety.penalty != "none" and safety.cost_model == "none":
        yield f"safety.penalty {safety.penalty} needs costs: safety.cost_model learned or geometric"
    if config.ray.address.startswith("ray://"):
        yield (
            f"a run cannot live on the other side of {config.ray.address}: use `safedreamer submit --address "
            "http://HEAD:8265 -- train ...`, or HOST:PORT of the head (usually 6379) on one of its nodes"
        )
    if config.ray.address and config.backend == "inline":
        yield "backend inline is one process: use backend local, or an empty --ray-address"
    if config.policy == "actor" and safety.penalty != "none":
        yield "safety.penalty shapes plans: use it with policy planner, or safety.constraint pid"
    if safety.penalty != "none" and safety.constraint != "none":
        yield "safety.penalty and safety.constraint would move one multiplier: choose one of them"
    if not config.world_model.latent and safety.cost_model != "tracked":
        yield "world_model.latent false leaves a scene alone to imagine: it needs safety.cost_model tracked"
    sources = config.env.observation.split("+")
    if safety.cost_model == "geometric" and "coordinates" not in sources:
        yield (
            f"safety.cost_model geometric reads hazard positions: {config.task} must be observed with "
            "env.observation coordinates (Goal tasks), or use a method that learns costs (osrp)"
        )
    if safety.cost_model == "tracked" and sources == ["vision"]:
        yield (
            "safety.cost_model tracked reads where things are: use an env.observation with coordinates or "
            "lidar, or a method that learns costs (osrp)"
        )


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


SHAPES_OF_LATENT = (
    "deter",
    "units",
    "stoch",
    "classes",
    "encoder_layers",
    "encoder_units",
    "cnn_depth",
    "head_layers",
)
"""Settings of the world model from which the arrays of an agent with a latent state get their shapes."""
OF_LATENT = (
    *SHAPES_OF_LATENT,
    "image_loss_scale",
    "vector_loss_scale",
    "geometry_loss_scale",
    "motion_loss_scale",
    "decoder_space",
    "cost_weight",
    "unimix",
    "free_nats",
    "dyn_scale",
    "rep_scale",
)
"""Settings of the world model that only an agent with a latent state reads."""

_SHARES = {
    "behavior.cost_gamma",
    "behavior.gamma",
    "behavior.lambda_",
    "behavior.slow_rate",
    "behavior.moments_decay",
    "planner.correlation",
    "planner.momentum",
    "safety.pid.cost_decay",
    "world_model.unimix",
}
_MAY_BE_ZERO = {
    "seed",
    "actors.slice_seconds",
    "actors.max_staleness",
    "inference.max_wait_ms",
    "replay.port",
    "world_model.head_layers",
    "world_model.unimix",
    "world_model.free_nats",
    "world_model.dyn_scale",
    "world_model.rep_scale",
    "behavior.cost_gamma",
    "behavior.imagine_starts",
    "behavior.entropy",
    "behavior.lambda_",
    "behavior.moments_decay",
    "safety.cost_limit",
    "planner.correlation",
    "planner.momentum",
    "planner.mixture_coef",
    "planner.exploration",
    "planner.temperature",
    "planner.tolerance",
    "planner.cost_scale_length",
    "learner.prefill",
    "learner.devices",
    "evaluation.every",
    "evaluation.seed",
}


_MAY_BE_HUGE = {"env_steps", "replay.capacity", "evaluation.every", "evaluation.seed", "learner.prefill"}
_NETWORKS = ("world_model.", "behavior.")
_LARGEST_NETWORK = 2**16  # units of a layer


def _not_positive(config: Config) -> Iterable[str]:
    for name, value in flatten(to_dict(config)).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, int) and abs(value) > _largest(name):
            yield f"`{name}` is too large: {shown(value)}; at most {_largest(name):,}"
            continue
        zero_is_fine = name in _MAY_BE_ZERO or name.startswith(("safety.augmented.", "safety.pid."))
        if math.isnan(value) or value < 0 or (value == 0 and not zero_is_fine):
            yield f"`{name}` must be {'at least 0' if zero_is_fine else 'greater than 0'}, not {value}"
        if math.isinf(value) and name != "safety.augmented.cap":
            yield f"`{name}` must be finite"
        if name in _SHARES and value > 1:
            yield f"`{name}` must be at most 1, not {value}"
        if name == "replay.port" and value > 65536 - config.replay.shards:
            yield f"`{name}` must be a port number (0 to 65535, with one more per shard), not {value}"


def _largest(name: str) -> int:
    if name in _MAY_BE_HUGE:
        return 2**53
    return _LARGEST_NETWORK if name.startswith(_NETWORKS) else 2**31 - 1
