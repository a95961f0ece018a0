"""The schema of a run's configuration: every setting, its default and what it means.

`common/configuration.py` fills it from presets, files and flags; `common/config_checks.py` refuses what
cannot work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


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
    server: Literal["auto", "reverb", "memory"] = "auto"
    """Reverb's server, or one of our own in the memory of a process (no port; everywhere). auto: Reverb under
    Ray where it exists (Linux x86_64, Python 3.11), else memory."""
    compression: Literal["auto", "none", "lz4"] = "auto"
    """Camera frames in a memory server: none is fastest, lz4 takes less than half of the memory; auto: lz4
    from a full buffer of 4 GB on. Reverb always compresses."""
    shards: int = 1
    """Replay servers. Actors are spread over them, every batch is drawn from all of them alike, and one that
    is down holds up its own actors only."""
    port: int = 0
    """Port of a Reverb server on its machine (of the first; others follow it); 0 picks free ones."""
    host: str = "auto"
    """The one address at which Reverb servers answer: auto is loopback, on a cluster the node's own; an
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
