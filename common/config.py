"""Configuration: frozen dataclasses are the schema, YAML layers and flags fill them.

Order, later wins: `default.yaml`, method, size, task, the method's own entries for that size and for the
observation, `--config` files, flags. Every layer passes the same typed checks, so that a wrong key or type is
refused with the place it stands in and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import ipaddress
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from common.types import UserError
from common.untrusted import read_bytes, shown

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_CHOICES = ("method", "size", "task")  # what chooses presets


@dataclass(frozen=True)
class EnvConfig:
    observation: Literal["lidar", "coordinates", "vision", "vision+lidar", "vision+coordinates"] = "lidar"
    """Sources of the observation: the task's own vector, egocentric coordinates (Goal tasks), the robot's
    cameras (navigation tasks)."""
    cameras: str = "auto"
    """Cameras of a vision observation, comma-separated: vision (ahead), vision_back (Point, Car, Racecar);
    auto takes all that the robot has."""
    action_repeat: int = 5
    """Env steps per agent step; reward and cost are summed over them."""


@dataclass(frozen=True)
class ActorsConfig:
    count: int = 1
    """Actor processes."""
    envs: int = 8
    """Environments per actor process."""
    slice_seconds: float = 1.0
    """An actor reports to the driver after about this many seconds of acting."""
    max_staleness: int = 0
    """An actor pauses while its parameters are more than this many versions behind the newest; 0: never."""


@dataclass(frozen=True)
class InferenceConfig:
    mode: Literal["auto", "local", "server"] = "auto"
    """Who computes the actors' decisions: each actor, or one server for all of them, on an accelerator if it
    can have one; auto: a server for planners of size paper where there is a GPU."""
    max_batch: int = 64
    """Environments that the server decides for at a time."""
    max_wait_ms: float = 5.0
    """Longest wait for further requests after the first one of a batch."""


@dataclass(frozen=True)
class ReplayConfig:
    capacity: int = 1_000_000
    """Agent steps kept; the oldest leave first."""
    stride: int = 1
    """Agent steps between the starts of stored windows."""
    shards: int = 1
    """Replay servers. Actors are spread over them, every batch is drawn from all of them alike, and one that
    is down holds up its own actors only."""
    port: int = 0
    """Port of the replay server on its machine (of the first; others follow it); 0 picks free ones."""
    host: str = "auto"
    """The one address at which the replay servers answer: auto is loopback, on a cluster the node's own; an
    IP address of their machine; or 0.0.0.0 for every address."""
    checkpoint: bool = True
    """Save the replay buffer with every checkpoint."""
    import_mode: Literal["lite", "full"] = "lite"
    """How Reverb is imported: only its shared libraries, or with all of TensorFlow."""


@dataclass(frozen=True)
class WorldModelConfig:
    latent: bool = True
    """Learn a latent state (RSSM). Without one (ours, cost model tracked), the robot's motion is all that is
    learned: imagination knows the scene that was seen."""
    deter: int = 512
    """Size of the deterministic (GRU) state."""
    units: int = 512
    """Width of the layers around the GRU and of the heads."""
    stoch: int = 48
    """Number of categorical variables in the stochastic state."""
    classes: int = 48
    """Classes of each categorical variable."""
    encoder_layers: int = 5
    """Hidden layers of the vector encoder and decoder."""
    encoder_units: int = 1024
    """Width of the vector encoder and decoder."""
    cnn_depth: int = 32
    """Channels of the first image convolution; every further one has twice as many."""
    head_layers: int = 2
    """Hidden layers of the reward, cost and continue heads."""
    bins: int = 255
    """Bins of every two-hot head and critic."""
    bin_range: float = 20.0
    """Two-hot bins span +- this value, in symlog space."""
    image_loss_scale: float = 1.0
    """Weight of the image reconstruction loss."""
    vector_loss_scale: float = 1.0
    """Weight of the vector reconstruction loss."""
    geometry_loss_scale: float = 1.0
    """Weight of positions (goal, hazards, robot) within the vector loss (published: 1)."""
    motion_loss_scale: float = 1.0
    """Weight of the predicted motion of the robot (cost model tracked)."""
    body_units: int = 128
    """Width of the network that predicts it."""
    decoder_space: Literal["raw", "symlog"] = "raw"
    """Space in which the vector decoder predicts (published: raw)."""
    cost_weight: float = 10.0
    """Weight of the cost loss where the true cost is at least 1."""
    unimix: float = 0.01
    """Share of the uniform distribution mixed into every categorical."""
    free_nats: float = 1.0
    """KL below this value is not penalised."""
    dyn_scale: float = 0.5
    """Weight of KL(stop_gradient(posterior) || prior)."""
    rep_scale: float = 0.1
    """Weight of KL(posterior || stop_gradient(prior))."""
    lr: float = 1e-4
    """Adam learning rate."""
    eps: float = 1e-8
    """Adam epsilon."""
    clip: float = 1000.0
    """Global gradient norm clip."""


@dataclass(frozen=True)
class BehaviorConfig:
    layers: int = 2
    """Hidden layers of actor and critics."""
    units: int = 512
    """Width of actor and critics."""
    horizon: int = 15
    """Imagined agent steps per start state."""
    imagine_starts: int = 0
    """Imagination starts per update, drawn from the batch; 0 takes every state."""
    gamma: float = 1 - 1 / 333
    """Discount per agent step."""
    cost_gamma: float = 0.0
    """Discount of costs per agent step (ours: hazards are near); 0: as for rewards (published)."""
    lambda_: float = 0.95
    """Mixing of the lambda-return."""
    entropy: float = 3e-4
    """Weight of the actor's entropy bonus."""
    slow_rate: float = 0.02
    """Share by which the slow critics follow per update."""
    moments_decay: float = 0.99
    """Decay of the running 5th and 95th return percentiles."""
    min_cost_scale: float = 0.25
    """Least scale by which cost advantages are divided (PID constraint), in imagined cost."""
    lr: float = 3e-5
    """Adam learning rate of actor and critics."""
    eps: float = 1e-5
    """Adam epsilon of actor and critics."""
    clip: float = 100.0
    """Global gradient norm clip of actor and critics."""


@dataclass(frozen=True)
class AugmentedConfig:
    multiplier: float = 1e-6
    """Initial Lagrange multiplier."""
    penalty: float = 5e-9
    """Initial penalty coefficient c of the quadratic term."""
    growth: float = 1e-5
    """Relative growth of c per update."""
    cap: float = math.inf
    """Upper bound of the multiplier (published: none)."""
    pessimistic: bool = True
    """Sum the imagined cost return over the horizon (true) or average it (false)."""


@dataclass(frozen=True)
class PidConfig:
    kp: float = 0.1
    """Proportional gain per unit of episode cost."""
    ki: float = 0.01
    """Integral gain per unit of episode cost and episode."""
    kd: float = 0.01
    """Derivative gain."""
    cap: float = 0.1
    """Upper bound of the multiplier."""
    anti_windup: bool = False
    """Bound the integral by the cap as well (ours; published: no)."""
    init: float = 0.001
    """Initial integral term."""
    warmup_env_steps: int = 5_000
    """The multiplier is zero and the controller does not move up to this many env steps."""
    cost_decay: float = 0.99
    """Decay of the running episode cost that the controller sees."""
    init_cost_limit: float = 0.0
    """Where the cost limit starts when it decays to `safety.cost_limit`; not above that: constant."""
    decay_limit_step: float = 2.0
    """By how much a decaying limit falls at a time."""
    decay_time_step: int = 20_000
    """Env steps between two falls of a decaying limit."""


@dataclass(frozen=True)
class SafetyConfig:
    cost_model: Literal["none", "learned", "geometric", "tracked"] = "learned"
    """Where imagined costs come from: no cost at all, a learned head, decoded hazards (OSRP-Vector), or the
    scene as observed where imagination starts and the robot's predicted motion (tracked: rewards, too)."""
    constraint: Literal["none", "augmented", "pid"] = "none"
    """Constraint on the actor's objective, also where it only proposes plans."""
    penalty: Literal["none", "pid"] = "none"
    """Multiplier on the cost return in the planner's objective (OSRP-Lag)."""
    cost_limit: float = 2.0
    """Limit b on the cost (per imagined return, plan or episode: see the method)."""
    hazard_radius: float = 0.25
    """Geometric and tracked cost: a hazard nearer than this (m) costs 1."""
    augmented: AugmentedConfig = field(default_factory=AugmentedConfig)
    pid: PidConfig = field(default_factory=PidConfig)


@dataclass(frozen=True)
class PlannerConfig:
    samples: int = 500
    """Action sequences drawn per iteration."""
    elites: int = 50
    """Sequences kept per iteration."""
    iterations: int = 6
    """Iterations of the cross-entropy method per decision."""
    tolerance: float = 0.0
    """Ends the iterations once the plan's mean moves by less (root mean square, in actions); 0 never does."""
    horizon: int = 15
    """Planned agent steps."""
    init_std: float = 1.0
    """Standard deviation of the first iteration."""
    correlation: float = 0.0
    """Of the noise of two consecutive actions of a candidate (ours; published: 0)."""
    momentum: float = 0.1
    """Share of the old mean kept in every iteration."""
    temperature: float = 0.0
    """Elites weigh exp(temperature * (objective - best)) (CEM); 0: all the same (OSRP)."""
    exploration: float = 0.0
    """Standard deviation of the noise on planned actions in training."""
    mixture_coef: float = 0.0
    """Actor proposals per iteration, as a share of `samples`."""
    cost_scale_length: int = 1000
    """The planned cost sum is scaled to an episode of this many agent steps; 0 does not scale."""


@dataclass(frozen=True)
class LearnerConfig:
    batch_size: int = 16
    """Windows per batch."""
    batch_length: int = 64
    """Agent steps per window."""
    train_ratio: float = 512.0
    """Replayed agent steps per collected agent step."""
    prefill: int = 1_000
    """Agent steps collected with random actions before learning starts."""
    publish_every: int = 10
    """Updates between two parameter versions."""
    log_every: int = 50
    """Updates between two readings of the training metrics."""
    max_bad_updates: int = 20
    """Updates in a row with a non-finite loss or gradient after which the run stops."""
    devices: int = 1
    """Devices of the learner's machine that share each batch (data parallel); 0: all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of what enters matrix products and convolutions in training; parameters, losses and sums stay float32.
    bfloat16 is for accelerators."""


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 10_000
    """Env steps between two evaluations; 0 evaluates only at the end."""
    episodes: int = 5
    """Episodes per evaluation during training."""
    final_episodes: int = 20
    """Episodes of the evaluation at the end of the run."""
    seed: int = 0
    """Seed of the evaluation layouts (never used in training)."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_seconds: float = 300.0
    """Wall-clock seconds between two checkpoints."""
    keep: int = 3
    """Complete checkpoints kept."""


@dataclass(frozen=True)
class SupervisionConfig:
    grace_seconds: float = 120.0
    """Seconds beyond its slice after which a part that does not answer is replaced."""
    backoff_seconds: float = 0.5
    """Wait before a failed part is started anew; doubles with every failure in a row, up to 30 s."""
    max_failures: int = 5
    """Failures of one part in a row, without progress in between, that a run survives."""


@dataclass(frozen=True)
class RayConfig:
    address: str = ""
    """Ray cluster to run on: HOST:PORT of its head, or auto for the one this machine belongs to; empty: a Ray
    of its own on this machine."""
    placement_seconds: float = 120.0
    """Longest wait until the cluster has room for every part."""
    learner_cpus: int = 2
    """CPUs of a cluster that learner and replay server share on one node; an actor and the evaluator take one
    each."""
    wait_for_gpu: bool = False
    """Wait for a GPU that an autoscaler brings, also while the cluster has none at all."""


@dataclass(frozen=True)
class LoggingConfig:
    every_seconds: float = 5.0
    """Seconds between two rows of `metrics.jsonl` (and lines, when there is no terminal)."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: Literal["online", "offline", "off"] = "off"
    """Weights & Biases logging."""
    wandb_project: str = "safedreamer"
    """W&B project."""
    live: bool = True
    """Live terminal view (only on a terminal)."""


@dataclass(frozen=True)
class Config:
    """Every choice of a run. A method, a size and a task are named presets of these fields."""

    method: str = "bsrp_pid"
    """Preset in configs/methods."""
    task: str = "SafetyPointGoal1-v0"
    """Safety-Gymnasium 1.0.0 task id."""
    size: str = "nano"
    """Preset in configs/sizes: nano (laptop CPU), small, paper (published figures)."""
    seed: int = 0
    """Seeds parameters, environments and exploration."""
    env_steps: int = 400_000
    """Env steps (simulator steps) to collect in all."""
    policy: Literal["actor", "planner"] = "actor"
    """Who acts: the actor network or the constrained planner."""
    backend: Literal["local", "inline"] = "local"
    """Processes under Ray, or everything in one process."""
    env: EnvConfig = field(default_factory=EnvConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# --- layers -------------------------------------------------------------------------------------

_T = Any  # a dataclass instance


_MAX_YAML = 100_000  # bytes; a complete configuration has about 6,000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, as YAML 1.2 does and YAML 1.1 does not, and refuses a key
    that stands twice in one mapping: the first one's settings would be lost in silence. It refuses merge
    keys (`<<`), too: a few nested ones unfold without an end."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name = key.value if isinstance(key.value, str) else None
            if name in seen or key.tag == "tag:yaml.org,2002:merge":
                what = (
                    f"`{shown(name)}` stands twice in one group" if name in seen else "`<<` is not supported"
                )
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*\.?([eE][-+]?\d+)|\d[\d_]*\.|\.(inf|nan))$"
    ),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping. Raises UserError for a missing file, bad syntax or anything but a mapping."""
    try:
        content = yaml.load(read_bytes(path, _MAX_YAML).decode(), _Loader)
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read as YAML: it is nested too deeply") from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {shown(str(error), 300)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    return content


def merge(config: _T, layer: Mapping[str, Any], source: str, prefix: str = "") -> _T:
    """`config` with the values of one (nested) layer, checked against the types of the fields.

    Args:
        source: where the layer comes from, for error messages.

    Raises:
        UserError: an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in layer.items():
        name = f"{prefix}{shown(key)}"
        if key not in hints:
            raise UserError(f"{source}: there is no setting `{name}`{did_you_mean(shown(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: `{name}` is a group of settings, not the value {_quoted(value)}")
            changes[key] = merge(getattr(config, key), value, source, f"{name}.")
        else:
            changes[key] = _typed(value, hints[key], name, source)
    return dataclasses.replace(config, **changes)


def _typed(value: Any, hint: Any, name: str, source: str) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        # YAML reads a bare `off` as False.
        if value is False and "off" in choices:
            return "off"
        options = ", ".join(map(str, choices))
        hint_text = did_you_mean(shown(value), choices)
        raise UserError(f"{source}: `{name}` must be one of {options}, not {_quoted(value)}{hint_text}")
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 means a million
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise UserError(f"{source}: `{name}` must be a {hint.__name__}, not {_quoted(value)}")
    return value


def _quoted(value: Any) -> str:
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """' (did you mean `x`?)' for the nearest of the choices, or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean `{near[0]}`?)" if near else ""


def presets(kind: str) -> list[str]:
    """Names of the presets in configs/<kind>s, e.g. `presets("method")`."""
    return sorted(path.stem for path in (CONFIG_DIR / f"{kind}s").glob("*.yaml"))


def describe(kind: str, name: str) -> str:
    """The comment on the first line of a preset."""
    first = (CONFIG_DIR / f"{kind}s" / f"{name}.yaml").read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip()


def load(
    method: str | None = None,
    size: str | None = None,
    task: str | None = None,
    files: Iterable[Path] = (),
    observation: str | None = None,
) -> Config:
    """Composes default, method, size, task, the method's own entries for that size and observation, files.

    Method, size and task that are not given are those that the files name, else the defaults; the default
    method and the observation are the task's.
    """
    file_layers = [(str(path), read_yaml(path)) for path in files]
    chosen: Config = Config()
    for source, layer in file_layers:
        chosen = merge(chosen, {key: layer[key] for key in _CHOICES if key in layer}, source)
    named = {key for _, layer in file_layers for key in _CHOICES if key in layer}
    task, size = task or chosen.task, size or chosen.size
    task_layers, suited = _task_layers(task)
    method = method or (chosen.method if "method" in named or not suited else suited)
    method_layer = _preset("method", method)
    special = {key: method_layer.pop(key, {}) for key in ("sizes", "observations")}
    config = merge(Config(), read_yaml(CONFIG_DIR / "default.yaml"), "configs/default.yaml")
    source = f"configs/methods/{method}.yaml"
    for name, layer in [
        (source, method_layer),
        (f"configs/sizes/{size}.yaml", _preset("size", size)),
        *task_layers,
        (f"{source}, sizes.{size}", special["sizes"].get(size, {})),
    ]:
        config = merge(config, layer, name)
    last_word = [
        *file_layers,
        ("--env.observation", {"env": {"observation": observation}} if observation else {}),
    ]
    chosen = config
    for name, layer in last_word:
        chosen = merge(chosen, layer, name)
    by_observation = special["observations"].get(chosen.env.observation, {})
    by_size = by_observation.pop("sizes", {}).get(size, {})
    source = f"{source}, observations.{chosen.env.observation}"
    for name, layer in [(source, by_observation), (f"{source}.sizes.{size}", by_size), *last_word]:
        config = merge(config, layer, name)
    return dataclasses.replace(config, method=method, size=size, task=task)


def _preset(kind: str, name: str) -> dict[str, Any]:
    known = presets(kind)
    if name not in known:
        raise UserError(
            f"there is no {kind} `{name}`{did_you_mean(name, known)}; {kind}s: {', '.join(known)}"
        )
    return read_yaml(CONFIG_DIR / f"{kind}s" / f"{name}.yaml")


def _task_layers(task: str) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """Task presets whose `match` patterns fit, and the default method that they name, if any."""
    layers, method = [], None
    for path in sorted((CONFIG_DIR / "tasks").glob("*.yaml")):
        layer = read_yaml(path)
        if any(fnmatch.fnmatchcase(task, pattern) for pattern in layer.pop("match")):
            method = layer.pop("method", method)
            layers.append((f"configs/tasks/{path.name}", layer))
    return layers, method


def to_dict(config: _T) -> dict[str, Any]:
    """The configuration as nested dicts, as YAML and JSON hold it."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """A complete configuration, e.g. a run's config.yaml."""
    return merge(Config(), values, source)


def dump(config: Config) -> str:
    """The configuration as YAML that `read_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# --- checks -------------------------------------------------------------------------------------


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


OF_LATENT = (
    "deter",
    "units",
    "stoch",
    "classes",
    "encoder_layers",
    "encoder_units",
    "cnn_depth",
    "head_layers",
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
