"""A run is a directory.

config.yaml, versions.json, metrics.jsonl, episodes.jsonl, checkpoints/, replay/, curves.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import checkpoint, config_checks, configuration, versions
from common.config import Config
from common.metrics import EPISODES, METRICS
from common.types import UserError
from common.untrusted import is_count
from common.versions import Stretch
from common.yaml_file import read_yaml
from deploy.outcome import Counters

CONFIG = "config.yaml"
VERSIONS = "versions.json"
CHECKPOINTS = "checkpoints"
REPLAY = "replay"
REPLAY_LOG = "replay.log"
PLOT = "curves.png"
LOCK = ".lock"
WARM_START = "from_checkpoint.json"

_OWN = {
    *(CONFIG, VERSIONS, METRICS, EPISODES, CHECKPOINTS, REPLAY, REPLAY_LOG, PLOT, LOCK, WARM_START),
    *("tensorboard", "wandb"),
}

# What may change when a run is resumed; everything else would make another run of it.
RESUMABLE = (
    "env_steps",
    "backend",
    "actors.count",
    "actors.slice_seconds",
    "actors.max_staleness",
    "inference",
    "learner.devices",
    "learner.precision",
    "replay.host",
    "replay.server",
    "replay.compression",
    "evaluation",
    "checkpoint",
    "supervision",
    "ray",
    "logging",
)


def replay_dir(run: Path, shard: int, shards: int) -> Path:
    """Where a replay server keeps its checkpoints."""
    return run / REPLAY if shards == 1 else run / REPLAY / f"shard{shard}"


def default_path(cfg: Config) -> Path:
    """runs/<task>/<method>-<size>-seed<seed>-<time> below the current directory."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / cfg.task / f"{cfg.method}-{cfg.size}-seed{cfg.seed}-{stamp}"


def create(path: Path, cfg: Config) -> Path:
    """Makes a new run directory with the resolved configuration in it.

    Raises UserError where there is a run already, or no permission or room.
    """
    path = path.absolute()
    try:
        if (path / CONFIG).exists():
            raise UserError(
                f"{path} holds a run already; continue it with --resume {path}, or choose another --run-dir"
            )
        path.mkdir(parents=True, exist_ok=True)
        write_config(path, cfg)
    except OSError as error:
        raise UserError(
            f"the run directory {path} cannot be written ({error.strerror}); choose another --run-dir"
        ) from None
    return path


def discard_unused(path: Path) -> None:
    """Removes a run directory in which nothing was trained, so that the next try may have its name."""
    metrics = path / METRICS
    if (path / CHECKPOINTS).exists() or (metrics.exists() and metrics.stat().st_size):
        return
    for directory in (REPLAY, "tensorboard", "wandb"):
        shutil.rmtree(path / directory, ignore_errors=True)
    for file in (CONFIG, VERSIONS, LOCK, REPLAY_LOG, METRICS, EPISODES, PLOT, WARM_START):
        (path / file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        path.rmdir()


def check_links(path: Path) -> None:
    """Raises UserError when something of a run is a symbolic link: training would write where it leads."""
    for entry in sorted(path.iterdir()):
        if entry.name in _OWN and entry.is_symlink():
            raise UserError(
                f"{entry} is a symbolic link, through which no run writes; put the thing itself there"
            )


def write_config(path: Path, cfg: Config) -> None:
    """Writes config.yaml whole or not at all. Raises OSError."""
    _write_whole(path / CONFIG, configuration.dump(cfg))


def note_versions(path: Path, *, resume: bool) -> list[Stretch]:
    """Writes down what a run trains on from now on, and what it has trained on: that says its checkpoint.

    A run without one begins anew, whatever it began with. Raises UserError where nothing can be written.
    """
    newest = checkpoint.latest(path / CHECKPOINTS) if resume else None
    meta = {} if newest is None else checkpoint.read_meta(newest)
    made_with = versions.continued(versions.recorded(meta.get("versions")), meta.get("env_steps", 0))
    try:
        _write_whole(path / VERSIONS, json.dumps(versions.as_json(made_with), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the run directory {path} cannot be written ({error.strerror})") from None
    return made_with


def _write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_config(path: Path) -> Config:
    """The configuration of a run. Raises UserError when `path` is no run directory."""
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is not a run directory: it has no {CONFIG}")
    return configuration.from_dict(read_yaml(path / CONFIG), str(path / CONFIG))


def config_of(found: Path, meta: Mapping[str, Any]) -> Config:
    """The configuration saved in the checkpoint `found`.

    Raises UserError when it holds none, or not the counts that a training saves with it.
    """
    if not _is_of_a_training(meta):
        raise UserError(f"{found} is not a checkpoint of `safedreamer train`: it holds no configuration")
    cfg = configuration.from_dict(meta["config"], str(found))
    config_checks.check(cfg)
    return cfg


def _is_of_a_training(meta: Mapping[str, Any]) -> bool:
    config, counters = meta.get("config"), meta.get("counters")
    if not isinstance(config, dict) or not isinstance(counters, dict):
        return False
    known = {field.name for field in dataclasses.fields(Counters)}
    numbers = all(isinstance(value, int | float) and -1 <= value < 2**63 for value in counters.values())
    counts = all(is_count(meta.get(name)) for name in ("env_steps", "updates", "version"))
    return numbers and counts and counters.keys() <= known


def check_resumable(saved: Config, wanted: Config) -> None:
    """Raises UserError when a run would be resumed with a setting changed that makes it another run."""
    before = configuration.flatten(configuration.to_dict(saved))
    after = configuration.flatten(configuration.to_dict(wanted))
    for name, value in after.items():
        if value != before[name] and not name.startswith(RESUMABLE):
            raise UserError(
                f"`{name}` cannot change when a run is resumed (saved: {before[name]}, given: {value}); "
                f"these can: {', '.join(RESUMABLE)}"
            )


def check_unfinished(path: Path, cfg: Config) -> None:
    """Raises UserError when a run has its env steps already."""
    newest, done = checkpoint.latest(path / CHECKPOINTS), 0
    if newest is not None:
        meta = checkpoint.read_meta(newest)
        config_of(newest, meta)
        done = meta["env_steps"]
    if done >= cfg.env_steps:
        raise UserError(
            f"this run has its {done} env steps already; to go on, give --env-steps more than that"
        )


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds a run for one process. Raises UserError when another one trains in it now, or none may."""
    try:
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"the run {path} cannot be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process trains in {path} right now") from None
        yield
    finally:
        os.close(handle)
