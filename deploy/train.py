"""`safedreamer train`: from a resolved configuration to a finished run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import psutil

from common import config_checks, memory
from common.config import Config
from common.plots import plot_run
from common.status import Status
from common.terminal import RunResult, TerminalView, print_result
from common.types import EnvSpec, UserError
from deploy import run_dir as runs
from deploy import signals, warm_start, wiring
from deploy.driver import Driver, Workers
from deploy.outcome import Outcome
from deploy.warm_start import WarmStart
from learner.train_step import TrainStep
from replay.storage import made_by
from replay.table import table_spec

logger = logging.getLogger(__name__)


def _inline(cfg: Config, spec: EnvSpec, run: Path) -> Workers:
    from deploy.inline import InlineWorkers

    memory.keep_freed()
    return InlineWorkers(cfg, spec, run)


def _local(cfg: Config, spec: EnvSpec, run: Path) -> Workers:
    from deploy.local import RayWorkers

    return RayWorkers(cfg, spec, run)


BACKENDS: dict[str, Callable[[Config, EnvSpec, Path], Workers]] = {"inline": _inline, "local": _local}


def check(cfg: Config, warm: WarmStart | None = None) -> EnvSpec:
    """Raises UserError for what only the environment's description, the replay table and the checkpoint
    from which the run begins can tell."""
    spec = wiring.spec_of(cfg)
    _check_size(wiring.train_step(cfg, spec))
    if warm is not None:
        warm_start.check_arrays(warm, cfg, spec)
    for shard in range(cfg.replay.shards):
        table_spec(**wiring.replay_arguments(cfg, spec, shard))
    return spec


def train(cfg: Config, run: Path, *, resume: bool) -> Outcome:
    """Trains in an existing run directory, prints the result, and draws the curves.

    Raises UserError when the run cannot start or go on, and Interrupted when a signal ends it before
    there is anything to save (or for the second time).
    """
    cfg = wiring.settled(cfg, made_by(runs.replay_dir(run, 0, cfg.replay.shards)))
    spec = check(cfg)
    runs.check_links(run)
    if not resume and (idle := config_checks.unread(cfg)):
        names, verb = ", ".join(idle), "has" if len(idle) == 1 else "have"
        logger.warning("%s %s no effect on an agent without a latent (world_model.latent false)", names, verb)
    status = Status(cfg.method, cfg.task, cfg.size, cfg.seed, run, cfg.env_steps)
    status.train_ratio_target = cfg.learner.train_ratio
    with (
        signals.handled(signals.interrupt),
        runs.lock(run),
        TerminalView(status, live=cfg.logging.live, every_seconds=cfg.logging.every_seconds),
    ):
        if resume:
            runs.check_unfinished(run, cfg)
            runs.write_config(run, cfg)
        made_with = runs.note_versions(run, resume=resume)
        if not cfg.ray.address:  # there another node holds the buffer
            _announce_memory(cfg, spec)
        workers = BACKENDS[cfg.backend](cfg, spec, run)
        try:
            outcome = Driver(cfg, spec, run, workers, status, made_with).run(resume)
        finally:
            workers.close()
    _report(cfg, run, outcome)
    return outcome


def _check_size(train: TrainStep) -> None:
    """Raises UserError when this machine could not even hold what is trained."""
    arrays = jax.tree.leaves(jax.eval_shape(train.init, 0))
    needed, there = sum(x.size * x.dtype.itemsize for x in arrays), psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"parameters and optimizer states would take {needed / 1e9:,.0f} GB, and this machine has "
            f"{there / 1e9:,.0f} GB; choose a smaller --size, or smaller sizes in world_model and behavior"
        )


def _announce_memory(cfg: Config, spec: EnvSpec) -> None:
    ceiling = wiring.replay_memory(cfg, spec)
    free = psutil.virtual_memory().available
    steps = f"{cfg.replay.capacity:,} agent steps"
    text = f"replay: at most {ceiling / 1e9:.2f} GB for {steps} ({free / 1e9:.1f} GB free)"
    logger.info(text)
    if ceiling > free:
        logger.warning("%s; choose a smaller --replay.capacity if it fills up", text)


def _report(cfg: Config, run: Path, outcome: Outcome) -> None:
    counters = outcome.counters
    plot: Path | None = None
    try:
        plot = plot_run(run, run / runs.PLOT)
    except OSError as error:
        logger.warning("the curves could not be drawn: %s", error)
    if outcome.summary is None:
        return
    print_result(
        RunResult(
            summary=outcome.summary,
            env_steps=counters.env_steps,
            updates=counters.updates,
            wall_seconds=counters.wall_seconds,
            train_ratio=counters.train_ratio(cfg.learner.prefill),
            train_ratio_target=cfg.learner.train_ratio,
            run_dir=run,
            plot=plot,
        )
    )
