"""The training loop: batch -> step -> publish -> log. Everything it touches comes in through arguments."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import checkpoint
from common.types import Batch, EpisodeResult, Params, UserError, replay_spec
from learner.placement import place
from learner.train_step import TrainState, TrainStep

_POLL_SECONDS = 0.2  # longest wait for a batch before the loop looks at the clock again


Source = Callable[[float], Batch | None]  # timeout in seconds -> a batch, if one came in time


def _compiler_options() -> dict[str, str | bool] | None:
    """LLVM's higher levels cost 2.7x the compile time on a CPU here and bring no measurable speed."""
    level = "xla_backend_optimization_level"
    chosen = level in os.environ.get("XLA_FLAGS", "")  # by whoever runs this
    return None if chosen or jax.default_backend() != "cpu" else {level: "1"}


@dataclass
class LearnerReport:
    """What one slice of learning did."""

    updates: int = 0  # in all, since the run began
    replayed_steps: int = 0  # agent steps trained on in this slice
    seconds: float = 0.0
    waited_seconds: float = 0.0  # for batches, that is, for the actors
    version: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Learner:
    """Owns the TrainState. One instance per run, in one process.

    Args:
        source: gives batches, `replay.sampler.BatchSampler.next` for one.
        publish: takes (version, leaves of the acting parameters as numpy) and hands them to the actors.
        dump_dir: where a batch that broke training is written.
    """

    def __init__(
        self,
        train: TrainStep,
        source: Source,
        publish: Callable[[int, Params], None],
        dump_dir: Path,
    ):
        self._train, self._source, self._publish_to, self._dump_dir = train, source, publish, dump_dir
        self._cfg = train.cfg.learner
        self._place = place(self._cfg.devices, self._cfg.batch_size)
        self._state = train.start(self._place.state)
        self._on_episode = jax.jit(train.constraint.on_episode, out_shardings=self._place.state)
        self._updates = 0
        self._version = 0
        self._pending: list[dict[str, Any]] = []  # device metrics that nobody has read yet
        self._compiled: Callable | None = None

    def compile(self) -> float:
        """Compiles the train step on an empty batch; returns the seconds it took."""
        started = time.monotonic()
        shape = (self._cfg.batch_size, self._cfg.batch_length)
        batch = {
            name: jax.ShapeDtypeStruct((*shape, *spec.shape), spec.dtype, sharding=self._place.batch)
            for name, spec in replay_spec(self._train.spec).items()
        }
        step = jax.jit(self._train.step, donate_argnums=0, out_shardings=self._place.state)
        lowered = step.lower(self._state, batch)
        self._compiled = lowered.compile(_compiler_options())
        return time.monotonic() - started

    def publish(self) -> int:
        """Hands the present parameters out as a new version."""
        self._version += 1
        leaves = jax.tree.leaves(self._train.acting(self._state))
        self._publish_to(self._version, jax.device_get(leaves))
        return self._version

    def number_versions_from(self, version: int) -> None:
        """Versions to come are newer than `version`, which an earlier life of this learner handed out."""
        self._version = max(self._version, version)

    def run(
        self, seconds: float, episodes: Iterable[EpisodeResult] = (), env_steps: int = 0
    ) -> LearnerReport:
        """Trains for about `seconds`.

        Args:
            episodes: training episodes finished since the last call; they drive the PID multiplier.
            env_steps: env steps collected so far.

        Raises:
            UserError: `max_bad_updates` updates in a row were not finite; the last batch is dumped.
        """
        if self._compiled is None:
            self.compile()
        self._see_episodes(episodes, env_steps)
        report = LearnerReport()
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            asked = time.monotonic()
            batch = self._source(_POLL_SECONDS)
            report.waited_seconds += time.monotonic() - asked
            if batch is not None:
                self._update(batch)
                report.replayed_steps += batch["reward"].size
        report.seconds = time.monotonic() - started
        report.updates, report.version = self._updates, self._version
        report.metrics = self._read_metrics()
        return report

    def save(self, directory: Path, meta: dict[str, Any]) -> None:
        """Writes a checkpoint of the whole TrainState, named by the number of updates."""
        counters = {"updates": self._updates, "version": self._version}
        step = int(meta["env_steps"])
        checkpoint.save(
            directory,
            step,
            jax.device_get(self._state),
            meta | counters,
            keep=self._train.cfg.checkpoint.keep,
        )

    def restore(self, directory: Path) -> checkpoint.Restored | None:
        """Continues from the newest complete checkpoint in a run's directory, if there is one."""
        restored = checkpoint.restore_latest(directory, self._state)
        if restored is not None:
            self._state = self._placed(restored.tree)
            self._updates, self._version = restored.meta["updates"], restored.meta["version"]
        return restored

    def begin_from(self, path: Path) -> None:
        """Takes parameters, optimizer states, moments and multiplier from a checkpoint.

        Counters and random key stay this run's own; `TrainState.updates` goes on, for it says that the slow
        critics have begun to follow.
        """
        tree = self._placed(checkpoint.restore(path, self._state).tree)
        self._state = tree._replace(key=self._state.key, bad_in_row=self._state.bad_in_row)

    def _update(self, batch: Batch) -> None:
        assert self._compiled is not None
        # A copy: the CPU backend may otherwise read the sampler's buffer while it is being refilled.
        on_device = {name: jax.device_put(value.copy(), self._place.batch) for name, value in batch.items()}
        self._state, metrics = self._compiled(self._state, on_device)
        self._updates += 1
        self._pending.append(metrics)
        if len(self._pending) > 1:
            # One step may be in flight while the next batch is fetched; more would only queue up.
            jax.block_until_ready(self._pending[-2])
        if self._updates % self._cfg.log_every == 0:
            self._stop_if_broken(batch)
        if self._updates % self._cfg.publish_every == 0:
            self.publish()

    def _placed(self, tree: TrainState) -> TrainState:
        """A copy on the devices: the numpy arrays of a checkpoint must not be donated."""
        return jax.device_put(jax.tree.map(jnp.array, tree), self._place.state)

    def _see_episodes(self, episodes: Iterable[EpisodeResult], env_steps: int) -> None:
        multiplier = self._state.multiplier
        for episode in episodes:
            multiplier = self._on_episode(multiplier, episode.cost, env_steps)
        self._state = self._state._replace(multiplier=multiplier)

    def _read_metrics(self) -> dict[str, float]:
        """Means over the updates since the last reading."""
        rows, self._pending = jax.device_get(self._pending), []
        if not rows:
            return {}
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        means["safety/multiplier"] = float(rows[-1]["safety/multiplier"])
        return means

    def _stop_if_broken(self, batch: Batch) -> None:
        bad = int(self._state.bad_in_row)
        if bad < self._cfg.max_bad_updates:
            return
        path = self._dump_dir / f"bad_batch_{self._updates}.npz"
        np.savez_compressed(path, **batch)
        raise UserError(
            f"training stopped: the last {bad} updates were not finite. The last batch is in {path}; "
            "try a smaller world_model.lr or behavior.lr, and resume from the last checkpoint"
        )
