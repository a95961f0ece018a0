"""The only place where parts meet. A configured name becomes a function here, once.

Another constraint, cost model or way to act is one more line in the tables below; a method is a YAML
file in configs/methods that picks from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from actors.evaluate import evaluation_seeds
from actors.inference import Inference, InferenceClient, LocalInference, RemoteInference
from actors.inference_server import InferenceServer
from actors.rollout import Rollout
from actors.safety_gym import env_spec
from actors.tasks import cameras
from actors.vector_env import SafetyVectorEnv
from common.config import Config, ReplayConfig, SafetyConfig
from common.types import (
    ArraySpec,
    Batch,
    EnvSpec,
    Params,
    ParamSource,
    Policy,
    UserError,
    Writer,
    replay_spec,
)
from learner.cost_model import (
    LATENT,
    Features,
    Look,
    SignalModel,
    decoded_hazards,
    free_of_cost,
    learned_cost,
    learned_reward,
    look_at,
    look_away,
    scene_features,
    tracked_obstacles,
    tracked_reward,
)
from learner.lagrange import Constraint, augmented, pid, pid_penalty, unconstrained
from learner.layout import layout_of
from learner.open_loop import Prediction, open_loop
from learner.policy import ActingParams, Choose, actor_choice, make_policy, planner_choice
from learner.train_step import Shared, TrainStep
from replay import backend
from replay.memory.link import Link
from replay.memory.source import MemorySource
from replay.memory.writer import stream_writers as memory_writers
from replay.reverb_source import ReverbSource
from replay.sampler import Source
from replay.shards import Sampler, batches
from replay.table import frames_bytes, memory_ceiling, reverb_ceiling, step_bytes
from replay.writer import StreamWriter

_LARGE_FRAMES = 4e9  # bytes of frames in a full replay, from which on they are compressed

CONSTRAINTS: dict[str, Callable[[SafetyConfig], Constraint]] = {
    "none": lambda safety: unconstrained(),
    "augmented": lambda safety: augmented(safety.augmented, safety.cost_limit),
    "pid": lambda safety: pid(safety.pid, safety.cost_limit),
}


# A planner's penalty; the actor behind it maximises reward alone.
PENALTIES: dict[str, Callable[[SafetyConfig], Constraint]] = {
    "pid": lambda safety: pid_penalty(safety.pid, safety.cost_limit),
}


def _geometric(safety: SafetyConfig, spec: EnvSpec) -> SignalModel:
    (hazards,) = _slices(spec, "hazards")
    return decoded_hazards(hazards, safety.hazard_radius)


def _slices(spec: EnvSpec, *names: str) -> list[tuple[int, int]]:
    for name in names:
        if name not in spec.slices:
            raise UserError(
                f"{spec.task} observes no {name}, which this safety.cost_model needs; "
                "use safety.cost_model learned"
            )
    return [spec.slices[name] for name in names]


COST_MODELS: dict[str, Callable[[SafetyConfig, EnvSpec], SignalModel]] = {
    "none": lambda safety, spec: free_of_cost,
    "learned": lambda safety, spec: learned_cost,
    "geometric": _geometric,
    "tracked": lambda safety, spec: tracked_obstacles(safety.hazard_radius),
}


class Tracking(NamedTuple):
    """What a cost model brings besides costs."""

    features: Features  # what actor and critics see
    look: Look
    reward: SignalModel


def _track_scene(spec: EnvSpec) -> Tracking:
    if spec.scene is None:
        raise UserError(
            f"{spec.task} observes no goal and obstacles to track with safety.cost_model tracked; use "
            "safety.cost_model learned"
        )
    layout = layout_of(spec)
    return Tracking(scene_features(layout), look_at(layout), tracked_reward)


TRACKING: dict[str, Callable[[EnvSpec], Tracking]] = {"tracked": _track_scene}


class CostMeaning(NamedTuple):
    """What the numbers of a cost model stand for."""

    source: str
    per_agent_step: bool  # summed over the action repeat, or the rate per env step on arriving


COST_MEANINGS: dict[str, CostMeaning] = {
    "none": CostMeaning("nothing: always zero", False),
    "learned": CostMeaning("the learned head", True),
    "geometric": CostMeaning("decoded hazards", False),
    "tracked": CostMeaning("tracked hazards", False),
}


def _tracking(cfg: Config, spec: EnvSpec) -> Tracking:
    nothing = lambda spec: Tracking(LATENT, look_away, learned_reward)  # noqa: E731
    return TRACKING.get(cfg.safety.cost_model, nothing)(spec)


def _actor(cfg: Config, spec: EnvSpec, explore: bool) -> Choose:
    return actor_choice(explore=explore, features=_tracking(cfg, spec).features)


def _planner(cfg: Config, spec: EnvSpec, explore: bool) -> Choose:
    tracking = _tracking(cfg, spec)
    return planner_choice(
        COST_MODELS[cfg.safety.cost_model](cfg.safety, spec),
        cfg.planner,
        cfg.behavior,
        cfg.safety.cost_limit,
        explore=explore,
        features=tracking.features,
        reward_model=tracking.reward,
    )


class Way(NamedTuple):
    """A way to act: how it chooses, and what it must be sent."""

    choose: Callable[[Config, EnvSpec, bool], Choose]
    shared: Callable[[SafetyConfig], Shared]


POLICIES = {
    "actor": Way(_actor, lambda safety: Shared(False, False)),
    "planner": Way(_planner, lambda safety: Shared(True, safety.penalty != "none")),
}


def _constraint(safety: SafetyConfig) -> Constraint:
    """Whatever moves the multiplier: the actor's constraint or the planner's penalty, never both."""
    if safety.penalty != "none":
        return PENALTIES[safety.penalty](safety)
    return CONSTRAINTS[safety.constraint](safety)


def spec_of(cfg: Config) -> EnvSpec:
    """The environment's description.

    Raises UserError for an unknown task, observation or camera, and for vision without OpenGL.
    """
    return env_spec(cfg.task, cfg.env.observation, cfg.env.action_repeat, cfg.env.cameras)


def cameras_of(cfg: Config) -> tuple[str, ...]:
    """Names of the agent's cameras, in the order of the images it observes; none without vision."""
    return cameras(cfg.task, cfg.env.observation, cfg.env.cameras)


def predict(cfg: Config, spec: EnvSpec, params: ActingParams, batch: Batch, context: int) -> Prediction:
    """The open-loop prediction of a configuration's world model, see `learner.open_loop`."""
    cost_model, tracking = COST_MODELS[cfg.safety.cost_model](cfg.safety, spec), _tracking(cfg, spec)
    return open_loop(params.model, cost_model, tracking.look, batch, context, tracking.reward)


def predictor(cfg: Config, spec: EnvSpec, context: int) -> Callable[[Params, Batch], Prediction]:
    """`predict` for parameters as the learner publishes them, compiled once."""
    cost_model, tracking = COST_MODELS[cfg.safety.cost_model](cfg.safety, spec), _tracking(cfg, spec)
    structure = _published_structure(cfg, spec)

    def predict(leaves: Params, batch: Batch) -> Prediction:
        model = jax.tree.unflatten(structure, leaves).model
        return open_loop(model, cost_model, tracking.look, batch, context, tracking.reward)

    return predict


def cost_unit(cfg: Config) -> float | None:
    """Cost per agent step that an imagined cost of 1 stands for; None where costs are not imagined."""
    if cfg.safety.cost_model == "none":
        return None
    return 1.0 if COST_MEANINGS[cfg.safety.cost_model].per_agent_step else float(cfg.env.action_repeat)


def train_step(cfg: Config, spec: EnvSpec) -> TrainStep:
    """The trainable system of a configuration. Raises UserError where it does not fit the environment."""
    safety, way = cfg.safety, POLICIES[cfg.policy]
    tracking, learn_cost = _tracking(cfg, spec), safety.cost_model == "learned"
    return TrainStep(
        spec=spec,
        cfg=cfg,
        constraint=_constraint(safety),
        cost_model=COST_MODELS[safety.cost_model](safety, spec),
        learn_cost=learn_cost,
        # As published, every method with a learned cost has a cost critic, OSRP-Vector has none.
        value_cost=learn_cost or safety.constraint != "none" or safety.penalty != "none",
        shared=way.shared(safety),
        features=tracking.features,
        look=tracking.look,
        reward_model=tracking.reward,
    )


def policy(cfg: Config, spec: EnvSpec, *, explore: bool) -> Policy:
    """The configured policy; without `explore` it is deterministic up to the model's own sampling."""
    model = cfg.world_model
    sizes = (model.deter, model.stoch, model.classes) if model.latent else (0, 0, 0)
    choose = POLICIES[cfg.policy].choose(cfg, spec, explore)
    rows = cfg.planner.horizon + 1 if cfg.policy == "planner" else 0
    return make_policy(choose, *sizes, spec.action_size, rows, _tracking(cfg, spec).look)


def published_policy(cfg: Config, spec: EnvSpec, *, explore: bool) -> Policy:
    """`policy` of parameters as the learner publishes them: the leaves of the tree alone.

    Equinox never lets go of a module that was unpickled, and with it of a whole version in the object
    store; besides, a tree of modules is slow to take apart at every call.
    """
    init, act = policy(cfg, spec, explore=explore)
    structure = _published_structure(cfg, spec)
    return Policy(init, lambda leaves, *rest: act(jax.tree.unflatten(structure, leaves), *rest))


def _published_structure(cfg: Config, spec: EnvSpec) -> Any:
    train = train_step(cfg, spec)
    return jax.tree.structure(jax.eval_shape(lambda: train.acting(train.init(cfg.seed))))


Reach = str | Link  # what leads to a replay: the address of a Reverb server, the link to one in memory


class Replay(NamedTuple):
    """A kind of replay, by what writes to it and reads from it."""

    # (reach, signature, cfg, batch length, numbers of the streams, should_stop) -> a writer per stream
    writers: Callable[
        [Any, dict[str, ArraySpec], ReplayConfig, int, Sequence[int], Callable[[], bool]], Sequence[Writer]
    ]
    source: Callable[[Any, dict[str, ArraySpec], Config], Source]
    memory: Callable[[dict[str, ArraySpec], ReplayConfig, int], int]  # bytes of a full table, at most


def _reverb_writers(
    address: str,
    signature: dict[str, ArraySpec],
    cfg: ReplayConfig,
    length: int,
    streams: Sequence[int],
    should_stop: Callable[[], bool],
) -> Sequence[Writer]:
    return [StreamWriter(address, signature, cfg, length, should_stop=should_stop) for _ in streams]


def _reverb_source(address: str, signature: dict[str, ArraySpec], cfg: Config) -> Source:
    return ReverbSource(
        address,
        signature,
        batch_size=cfg.learner.batch_size // cfg.replay.shards,
        batch_length=cfg.learner.batch_length,
        import_mode=cfg.replay.import_mode,
    )


def _memory_source(link: Link, signature: dict[str, ArraySpec], cfg: Config) -> Source:
    return MemorySource(
        link,
        signature,
        batch_size=cfg.learner.batch_size // cfg.replay.shards,
        batch_length=cfg.learner.batch_length,
    )


REPLAYS = {
    "reverb": Replay(_reverb_writers, _reverb_source, reverb_ceiling),
    "memory": Replay(memory_writers, _memory_source, memory_ceiling),
}


def settled(cfg: Config, made_by: str | None = None) -> Config:
    """The configuration with `replay.server auto` decided: Reverb under Ray, where it exists, else memory.

    Args:
        made_by: the server whose checkpoint is there, which goes on if it can.

    Raises UserError where Reverb is asked for and does not exist.
    """
    server = cfg.replay.server
    if server == "auto" and made_by in REPLAYS and (made_by != "reverb" or backend.exists()):
        server = made_by
    if server == "auto":
        server = "reverb" if cfg.backend == "local" and backend.exists() else "memory"
    if server == "reverb":
        backend.check_platform()
    return dataclasses.replace(cfg, replay=dataclasses.replace(cfg.replay, server=server))


def replay_config(cfg: Config, spec: EnvSpec) -> ReplayConfig:
    """Of one of several servers: its share of the capacity; and whether frames are compressed."""
    capacity, compression = cfg.replay.capacity, cfg.replay.compression
    if compression == "auto":
        compression = "lz4" if frames_bytes(replay_spec(spec), capacity) > _LARGE_FRAMES else "none"
    return dataclasses.replace(cfg.replay, capacity=capacity // cfg.replay.shards, compression=compression)


def replay_arguments(cfg: Config, spec: EnvSpec, shard: int) -> dict[str, Any]:
    """What a replay server and its table are made from: `signature`, `cfg`, `batch_length`, ...

    Each of several servers has an equal share of the capacity and of every batch, and its own actors.
    """
    shards = cfg.replay.shards
    actors = len(range(shard, cfg.actors.count, shards))
    return {
        "signature": replay_spec(spec),
        "cfg": replay_config(cfg, spec),
        "batch_length": cfg.learner.batch_length,
        "train_ratio": cfg.learner.train_ratio,
        "batch_size": cfg.learner.batch_size // shards,
        "min_steps": cfg.learner.prefill // shards,
        "streams": actors * cfg.actors.envs,
    }


def replay_memory(cfg: Config, spec: EnvSpec) -> int:
    """Bytes that all replay servers together need at most."""
    one = replay_config(cfg, spec)
    ceiling = REPLAYS[cfg.replay.server].memory(replay_spec(spec), one, cfg.learner.batch_length)
    return ceiling * cfg.replay.shards


def batch_bytes(cfg: Config, spec: EnvSpec) -> int:
    """Of a batch that replay sends through Ray; Reverb sends none."""
    steps = cfg.learner.batch_size * cfg.learner.batch_length
    return step_bytes(replay_spec(spec)) * steps if cfg.replay.server == "memory" else 0


def batch_sampler(cfg: Config, spec: EnvSpec, reaches: Sequence[Reach]) -> Sampler:
    """Of all replay servers together."""
    kind, signature = REPLAYS[cfg.replay.server], replay_spec(spec)
    return batches([kind.source(reach, signature, cfg) for reach in reaches])


def stream_writers(
    cfg: Config, spec: EnvSpec, reach: Reach, actor: int, should_stop: Callable[[], bool]
) -> Sequence[Writer]:
    """One per environment of an actor, whose steps go to one server."""
    first = actor // cfg.replay.shards * cfg.actors.envs  # a server's actors are every so many'th
    return REPLAYS[cfg.replay.server].writers(
        reach,
        replay_spec(spec),
        replay_config(cfg, spec),
        cfg.learner.batch_length,
        range(first, first + cfg.actors.envs),
        should_stop,
    )


def central_inference(cfg: Config, gpus: int) -> bool:
    """Whether one server decides for all actors, where there are so many GPUs."""
    if cfg.inference.mode == "auto":
        return gpus > 0 and cfg.policy == "planner" and cfg.size == "paper"
    return cfg.inference.mode == "server"


def inference_server(cfg: Config, spec: EnvSpec, source: ParamSource) -> InferenceServer:
    """Decides for the environments of all actors."""
    return InferenceServer(
        published_policy(cfg, spec, explore=True),
        source,
        spec.obs,
        actors=cfg.actors.count,
        envs=cfg.actors.envs,
        max_batch=cfg.inference.max_batch,
        max_wait_ms=cfg.inference.max_wait_ms,
    )


def rollout(
    cfg: Config,
    spec: EnvSpec,
    source: ParamSource,
    writers: Sequence[Writer],
    *,
    actor: int,
    life: int,
    prefill: int,
    server: InferenceClient | None = None,
) -> Rollout:
    """One actor's acting loop.

    Args:
        source: of parameters with which it decides by itself, unless there is a `server` to ask.
        actor: its number.
        life: how often it was started before (or the run's env steps at a resume): every life sees
            layouts and noise of its own.
        prefill: agent steps that this actor takes at random first.
    """
    seed = _seed(cfg.seed, actor, life)
    env = SafetyVectorEnv(
        cfg.task,
        cfg.env.observation,
        cfg.env.action_repeat,
        cfg.actors.envs,
        seed,
        cameras=cfg.env.cameras,
    )
    inference: Inference
    if server is None:
        policy = published_policy(cfg, spec, explore=True)
        inference = LocalInference(policy, source, spec.obs, cfg.actors.envs, seed)
    else:
        inference = RemoteInference(server, actor, seed)
    return Rollout(
        env,
        inference,
        writers,
        seed=seed,
        name=f"actor{actor}",
        random_steps=prefill,
        max_staleness=cfg.actors.max_staleness,
    )


def evaluation_env(cfg: Config, seed: int, episodes: int, *, render: bool = False) -> SafetyVectorEnv:
    """The held-out episodes of the evaluation protocol."""
    seeds = evaluation_seeds(seed, episodes)
    return SafetyVectorEnv.for_evaluation(
        cfg.task,
        cfg.env.observation,
        cfg.env.action_repeat,
        seeds,
        render=render,
        cameras=cfg.env.cameras,
    )


def _seed(*parts: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1)[0])
