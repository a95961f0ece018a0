"""`safedreamer import`: from a published SafeDreamer checkpoint to one of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from common import checkpoint, config_checks, configuration, versions
from common.config import Config
from common.types import VECTOR, EnvSpec, UserError
from common.yaml_file import read_yaml
from deploy import wiring
from deploy.outcome import Counters
from learner import reference_sizes
from learner.codec import image_keys
from learner.reference_checkpoint import ReferenceCheckpoint, read
from learner.reference_sizes import Sizes
from learner.reference_variables import assign
from learner.train_step import TrainState, TrainStep

_SIZE = "paper"  # the preset of everything that shapes do not tell


@dataclass(frozen=True)
class Wanted:
    """What the user says about a published checkpoint; it does not say so itself."""

    method: str
    task: str
    observation: str | None = None  # default: the method's
    files: Sequence[Path] = ()  # YAML files with settings
    stoch: int | None = None  # default: see `_split`
    classes: int | None = None


def import_checkpoint(path: Path, wanted: Wanted, out: Path) -> Path:
    """Converts the published checkpoint at `path` into one in the directory `out`; returns its path.

    Raises UserError when it is none, of another method, task or observation, or incomplete; nothing is
    written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out")
    cfg = load_config(wanted)
    spec, published = wiring.spec_of(cfg), read(path)
    agent_steps = published.step
    cfg, state = convert(published, cfg, wanted, spec)
    del published  # as large as all that is still to be done
    step, updates = agent_steps * cfg.env.action_repeat, int(state.updates)
    counters = Counters(
        env_steps=step,
        agent_steps=agent_steps,
        replayed_steps=updates * cfg.learner.batch_size * cfg.learner.batch_length,
        updates=updates,
    )
    meta = {
        "env_steps": step,
        "updates": updates,
        "version": 1,
        "counters": asdict(counters),
        "config": configuration.to_dict(cfg),
        "imported_from": path.name,
        "imported_with": versions.here(),  # what it was trained with, nobody wrote down
    }
    return checkpoint.save(out, step, state, meta)


def load_config(wanted: Wanted) -> Config:
    """The method's preset of the published size, before the checkpoint's own sizes."""
    return configuration.load(wanted.method, _SIZE, wanted.task, wanted.files, wanted.observation)


def convert(
    published: ReferenceCheckpoint, cfg: Config, wanted: Wanted, spec: EnvSpec
) -> tuple[Config, TrainState]:
    """`cfg` with the sizes of a published agent, and the agent itself.

    What it does not hold (PID state, random key) starts anew. Raises UserError for another method than
    `wanted` says, for an agent that does not fit the environment, and for a variable without its place.
    """
    _check_method(published, wanted.method)
    sizes = reference_sizes.sizes(published.variables)
    _check_environment(sizes, cfg, spec)
    cfg = _sized(cfg, sizes, wanted)
    config_checks.check(cfg)
    return cfg, assign(published.variables, _template(wiring.train_step(cfg, spec)), published.optimizers)


def _template(train: TrainStep) -> TrainState:
    """A new state of which only that exists which no published checkpoint holds: it is large."""
    anew = ("moments", "cost_moments", "multiplier", "bad_in_row", "key")

    def start() -> dict[str, Any]:
        state = train.init(train.cfg.seed)
        return {name: getattr(state, name) for name in anew}

    return jax.eval_shape(train.init, train.cfg.seed)._replace(**jax.jit(start)())


def _check_method(published: ReferenceCheckpoint, method: str) -> None:
    kinds = reference_sizes.methods(published.variables)
    if method not in kinds:
        raise UserError(
            f"this checkpoint is not of the method {method}: its variables are those of "
            f"{' or '.join(kinds)}; give --method {kinds[0]}"
        )


def _check_environment(sizes: Sizes, cfg: Config, spec: EnvSpec) -> None:
    """Compares observation and action of agent and environment."""
    images = [spec.obs[name].shape for name in image_keys(spec)]
    numbers = spec.obs[VECTOR].shape[0] if VECTOR in spec.obs else 0
    side = images[0][0] if images else 0
    ours = (numbers, side, sum(shape[-1] for shape in images))
    theirs = (sizes.vector, sizes.side, sizes.channels)
    if ours != theirs:
        raise UserError(
            f"this checkpoint observes {_observed(*theirs)}, but {cfg.task} with --observation "
            f"{cfg.env.observation} shows {_observed(*ours)}; give the --task and the --observation "
            "(lidar, coordinates, vision) that it was trained with"
        )
    if sizes.actions != spec.action_size:
        raise UserError(
            f"this checkpoint acts with {sizes.actions} numbers, but {cfg.task} takes {spec.action_size}; "
            "give the --task that it was trained with"
        )


def _observed(numbers: int, side: int, channels: int) -> str:
    parts = [f"{numbers} numbers"] if numbers else []
    if channels:
        parts.append(f"{channels / 3:g} image{'s' if channels > 3 else ''} of {side} x {side} pixels")
    return " and ".join(parts)


def _sized(cfg: Config, sizes: Sizes, wanted: Wanted) -> Config:
    stoch, classes = _split(sizes.latent, cfg, wanted)
    found = {
        "world_model": sizes.settings["world_model"] | {"stoch": stoch, "classes": classes},
        "behavior": sizes.settings["behavior"],
    }
    _check_files(found, wanted)
    return configuration.merge(cfg, found, "the published checkpoint")


def _check_files(found: dict[str, Any], wanted: Wanted) -> None:
    """Refuses sizes in the user's files that the checkpoint contradicts."""
    true = configuration.flatten(found)
    for path in wanted.files:
        for name, value in configuration.flatten(read_yaml(path)).items():
            if name in true and value != true[name]:
                raise UserError(f"{path}: `{name}` is {value}, but the checkpoint has {true[name]}")


def _split(latent: int, cfg: Config, wanted: Wanted) -> tuple[int, int]:
    """(categoricals, classes of each). The shapes tell only their product.

    Taken from the flags, else from the configuration where its product is right, else both are the square
    root: every published agent has as many classes as categoricals (48, 32 or 16).
    """
    stoch, classes = wanted.stoch, wanted.classes
    if stoch is not None or classes is not None:
        stoch = latent // max(1, classes or 1) if stoch is None else stoch
        classes = latent // max(1, stoch) if classes is None else classes
        hint = f"--stoch {stoch} and --classes {classes} make {stoch * classes}"
    elif cfg.world_model.stoch * cfg.world_model.classes == latent:
        return cfg.world_model.stoch, cfg.world_model.classes
    else:
        stoch = classes = math.isqrt(latent)
        hint = "this is no square; give --stoch and --classes"
    if stoch < 1 or classes < 1 or stoch * classes != latent:
        raise UserError(f"categoricals x classes is {latent} in this checkpoint; {hint}")
    return stoch, classes
