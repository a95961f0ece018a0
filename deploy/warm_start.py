"""`train --from-checkpoint`: a new run that begins with what a checkpoint holds.

A small file in the run's directory says where it began, so that a run that is resumed before its first own
checkpoint begins there again; from then on its own checkpoints count.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax

from common import checkpoint, configuration
from common.config import Config
from common.config_checks import SHAPES_OF_LATENT
from common.types import EnvSpec, UserError
from common.untrusted import is_count, read_json, shown
from deploy import run_dir as runs
from deploy import wiring
from replay import backend

_MAX_BYTES = 10_000

# Settings that name the agent or change the shapes of its arrays.
_FIXED = (
    "method",
    "size",
    "env.observation",
    "env.cameras",
    *(f"world_model.{name}" for name in ("latent", *SHAPES_OF_LATENT, "body_units", "bins")),
    "behavior.layers",
    "behavior.units",
)


@dataclass(frozen=True)
class WarmStart:
    """Where a run begins."""

    checkpoint: Path
    random_steps: int  # agent steps with random actions, of all actors, before the loaded policy acts


def saved_config(path: Path) -> tuple[Path, Config]:
    """The checkpoint that `path` means (a run, its checkpoints/, or one of them), and its configuration.

    A new run has no replay buffer yet, so that it need not have a server that only other packages have.
    """
    found = checkpoint.find_checkpoint(path.absolute())
    cfg = runs.config_of(found, checkpoint.read_meta(found))
    if cfg.replay.server == "reverb" and not backend.exists():
        cfg = dataclasses.replace(cfg, replay=dataclasses.replace(cfg.replay, server="auto"))
    return found, cfg


def check_settings(saved: Config, wanted: Config) -> None:
    """Raises UserError when a run would begin from a checkpoint of another kind or size."""
    before = configuration.flatten(configuration.to_dict(saved))
    after = configuration.flatten(configuration.to_dict(wanted))
    for name in _FIXED:
        if after[name] != before[name]:
            raise UserError(
                f"`{name}` cannot change with --from-checkpoint (checkpoint: {before[name]}, "
                f"given: {after[name]}); leave it out, or train anew"
            )


def check_arrays(start: WarmStart, cfg: Config, spec: EnvSpec) -> None:
    """Raises UserError when the checkpoint does not hold exactly the arrays that the run trains."""
    checkpoint.check_fit(start.checkpoint, jax.eval_shape(wiring.train_step(cfg, spec).init, 0))


def write(run: Path, start: WarmStart) -> None:
    """Records in a run's directory where it begins. Raises UserError when it cannot be written."""
    content = {"checkpoint": str(start.checkpoint), "random_steps": start.random_steps}
    try:
        (run / runs.WARM_START).write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"the run directory {run} cannot be written ({error.strerror})") from None


def read(run: Path) -> WarmStart | None:
    """Where a run begins; None where it begins untrained. Raises UserError where that is gone."""
    path = run / runs.WARM_START
    if not path.exists():
        return None
    try:
        content = read_json(path, _MAX_BYTES)
        start = WarmStart(Path(content["checkpoint"]), content["random_steps"])
        if not is_count(start.random_steps):
            raise ValueError("random_steps is no count")
        exists = start.checkpoint.exists()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = shown(str(error), 200)
        raise UserError(f"{path} is damaged ({reason}); start a new run with --from-checkpoint") from None
    if not exists:
        raise UserError(
            f"this run begins from {start.checkpoint}, which is gone; put it back or start a new run"
        )
    return start
