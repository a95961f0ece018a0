"""A run is a directory: config.yaml, metrics.jsonl, episodes.jsonl, checkpoints/, replay/, curves.png."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import config as configuration
from common.config import Config
from common.types import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
REPLAY = "replay"
PLOT = "curves.png"
LOGS = "logs"

# What may change when a run is resumed; everything else would make another run of it.
RESUMABLE = (
    "env_steps",
    "backend",
    "actors.count",
    "actors.slice_seconds",
    "evaluation",
    "checkpoint",
    "logging",
)


def default_path(cfg: Config) -> Path:
    """runs/<task>/<method>-<size>-seed<seed>-<time> below the current directory."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / cfg.task / f"{cfg.method}-{cfg.size}-seed{cfg.seed}-{stamp}"


def create(path: Path, cfg: Config) -> Path:
    """Makes a new run directory with the resolved configuration in it.

    Raises UserError where there is a run already, or no permission or room.
    """
    path = path.absolute()
    if (path / CONFIG).exists():
        raise UserError(
            f"{path} holds a run already; continue it with --resume {path}, or choose another --run-dir"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_config(path, cfg)
    except OSError as error:
        raise UserError(
            f"the run directory {path} cannot be written ({error.strerror}); choose another --run-dir"
        ) from None
    return path


def write_config(path: Path, cfg: Config) -> None:
    """Writes config.yaml whole or not at all."""
    temporary = path / f".{CONFIG}.tmp"
    temporary.write_text(configuration.dump(cfg))
    os.replace(temporary, path / CONFIG)


def read_config(path: Path) -> Config:
    """The configuration of a run. Raises UserError when `path` is no run directory."""
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is not a run directory: it has no {CONFIG}")
    return configuration.from_dict(configuration.read_yaml(path / CONFIG), str(path / CONFIG))


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


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds a run for one process. Raises UserError when another one trains in it now."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process trains in {path} right now") from None
        yield
    finally:
        os.close(handle)
