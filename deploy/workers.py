"""The parts of a run as plain objects with short calls; inline.py puts them in threads, local.py in Ray.

A call does a bounded slice of work and returns a report. The driver asks again, so that stopping,
checkpoints and supervision need no signals between processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from actors.evaluate import Recorder, play
from actors.inference import Answer, InferenceClient, Request
from actors.inference_server import InferenceReport
from actors.rollout import RolloutReport
from common.config import Config
from common.types import Array, Batch, EnvSpec, EpisodeResult, Params, ParamSource
from deploy import calibration, warm_start, wiring
from deploy import run_dir as runs
from deploy.warm_start import WarmStart
from deploy.wiring import Reach
from learner.learner import Learner, LearnerReport
from replay.shards import Sampler

_GRACE_SECONDS = 1.0  # an append may hold a slice up this long past its end
_FIRST_PARAMS_SECONDS = 600.0


@dataclass(frozen=True)
class Started:
    """How the learner came up."""

    meta: dict[str, Any] | None  # of the checkpoint it continues from
    compile_seconds: float
    backend: str  # cpu, gpu
    warnings: list[str] = field(default_factory=list)
    warm: WarmStart | None = None  # where it begins instead, if not untrained


class ParamStore(Protocol):
    """Where a learner puts its parameters."""

    def put(self, version: int, value: Params) -> None: ...

    def version(self) -> int:
        """The newest there is; 0 without any."""
        ...


def count_mixed(batch: Batch) -> int:
    """Windows of a batch [B, T, ...] that are not one stream: an episode begins where none has ended."""
    return int((batch["is_first"][:, 1:] != batch["is_last"][:, :-1]).any(1).sum())


class Ages:
    """How old the parameters are by now that acted in the batches, in versions and in seconds."""

    def __init__(self) -> None:
        self._versions, self._times = np.zeros(0, np.int64), np.zeros(0)  # published, ascending
        self._seen: list[tuple[float, float]] = []

    def published(self, version: int) -> None:
        self._versions = np.append(self._versions, version)
        self._times = np.append(self._times, time.monotonic())

    def see(self, versions: Array) -> None:
        """Takes the versions [B, T] of a batch; random actions (version 0) have no age."""
        acted = versions[versions > 0]
        if acted.size and self._versions.size:
            # What an earlier life of the learner has published counts as old as this life's first.
            found = np.maximum(np.searchsorted(self._versions, acted, "right") - 1, 0)
            self._seen.append(
                ((self._versions[-1] - acted).mean(), time.monotonic() - self._times[found].mean())
            )

    def pop(self) -> dict[str, float]:
        """Means since the last call."""
        seen, self._seen = self._seen, []
        if not seen:
            return {}
        versions, seconds = np.mean(seen, 0)
        return {"replay/age_versions": float(versions), "replay/age_seconds": float(seconds)}


class LearnerWorker:
    """Learner and sampler in one process."""

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path, store: ParamStore, reaches: Sequence[Reach]):
        self._cfg, self._spec, self._reaches, self._store = cfg, spec, reaches, store
        self._run_dir, self._checkpoints = run, run / runs.CHECKPOINTS
        self._sampler: Sampler | None = None
        self._mixed = 0
        self._ages = Ages()
        self._learner = Learner(wiring.train_step(cfg, spec), self._next_batch, self._publish, run)

    def start(self, resume: bool) -> Started:
        """Restores, compiles, publishes the first version. Call it once, before anything else."""
        restored = self._learner.restore(self._checkpoints) if resume else None
        self._learner.number_versions_from(self._store.version())
        warm = warm_start.read(self._run_dir) if restored is None else None
        if warm is not None:
            self._learner.begin_from(warm.checkpoint)
        seconds = self._learner.compile()
        self._learner.publish()
        self._sampler = wiring.batch_sampler(self._cfg, self._spec, self._reaches)
        meta, skipped = (restored.meta, restored.skipped) if restored else (None, [])
        return Started(meta, seconds, jax.default_backend(), skipped, warm)

    def run(self, seconds: float, episodes: Sequence[EpisodeResult], env_steps: int) -> LearnerReport:
        report = self._learner.run(seconds, episodes, env_steps)
        report.metrics["replay/mixed"] = self._mixed
        report.metrics |= self._ages.pop()
        return report

    def save(self, meta: dict[str, Any]) -> None:
        self._learner.save(self._checkpoints, meta)

    def publish(self) -> int:
        return self._learner.publish()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()

    def _next_batch(self, timeout: float) -> Any:
        assert self._sampler is not None
        batch = self._sampler.next(timeout)
        if batch is not None:
            self._mixed += count_mixed(batch)
            self._ages.see(batch["version"])
        return batch

    def _publish(self, version: int, params: Params) -> None:
        self._ages.published(version)
        self._store.put(version, params)


class InferenceWorker:
    """Decides for all actors."""

    def __init__(self, cfg: Config, spec: EnvSpec, source: ParamSource):
        self._server = wiring.inference_server(cfg, spec, source)

    def start(self) -> None:
        """Waits for the first parameters and compiles."""
        self._server.start(_FIRST_PARAMS_SECONDS)

    def act(self, request: Request) -> Answer:
        return self._server.act(request)

    def version(self) -> int:
        return self._server.version()

    def report(self) -> InferenceReport:
        return self._server.report()

    def stop(self) -> None:
        """May be called from another thread."""
        self._server.close()


class ActorWorker:
    """One rollout with its environments and writers."""

    def __init__(
        self,
        cfg: Config,
        spec: EnvSpec,
        source: ParamSource,
        reach: Reach,
        actor: int,
        life: int,
        prefill: int,
        server: InferenceClient | None = None,
    ):
        self._deadline = 0.0
        self._stopped = threading.Event()
        writers = wiring.stream_writers(cfg, spec, reach, actor, self._overdue)
        self._rollout = wiring.rollout(
            cfg, spec, source, writers, actor=actor, life=life, prefill=prefill, server=server
        )

    def start(self) -> None:
        """Waits for the first parameters and compiles."""
        self._rollout.warm_up(_FIRST_PARAMS_SECONDS)

    def run(self, seconds: float, max_env_steps: int, newest: int) -> RolloutReport:
        """Acts for a while; `newest` is the version of the newest parameters that the driver knows of."""
        self._deadline = time.monotonic() + seconds + _GRACE_SECONDS
        return self._rollout.run(seconds, max_env_steps, self._stopped.is_set, newest)

    def finish(self) -> None:
        """Sends the last windows to replay and frees the environments."""
        self._deadline = float("inf")
        self._rollout.close()

    def stop(self) -> None:
        """Shortens the slice in progress; may be called from another thread."""
        self._stopped.set()

    def close(self) -> None:
        self._stopped.set()
        self._rollout.close()

    def _overdue(self) -> bool:
        return self._stopped.is_set() or time.monotonic() > self._deadline


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found."""

    episodes: list[EpisodeResult]
    model: dict[str, float] = field(default_factory=dict)  # see `deploy.calibration`


class EvaluatorWorker:
    """Plays evaluation episodes with the newest parameters, and looks what the model makes of them."""

    def __init__(self, cfg: Config, spec: EnvSpec, source: ParamSource):
        self._cfg, self._spec, self._source = cfg, spec, source
        self._policy = wiring.published_policy(cfg, spec, explore=False)
        self._act = jax.jit(self._policy.act)
        self._version, self._params = 0, None
        self._env: Any = None
        self._playing: Iterator[list[EpisodeResult] | None] | None = None
        self._predict = wiring.predictor(cfg, spec, calibration.CONTEXT)
        self._recorder = Recorder(0)
        self._stopped = threading.Event()

    def refresh(self) -> None:
        """Takes the newest parameters."""
        newest = self._source.get(self._version)
        if newest is not None:
            self._version, self._params = newest

    def evaluate(self, seconds: float, episodes: int) -> EvaluationReport | None:
        """Results of the protocol's first `episodes` episodes, by the newest parameters of its first slice.

        None when they take longer than `seconds`: the next call goes on with them.
        """
        if self._playing is None:
            self._playing = self._begin(episodes)
        started = time.monotonic()
        for results in self._playing:
            if results is not None:
                self._playing = None
                return EvaluationReport(results, self._calibrate())
            if time.monotonic() - started >= seconds or self._stopped.is_set():
                break
        return None

    def _begin(self, episodes: int) -> Iterator[list[EpisodeResult] | None]:
        self.refresh()
        if self._params is None:
            raise RuntimeError("evaluation before any parameters were published")
        seed = self._cfg.evaluation.seed
        if self._env is None or self._env.num_envs != episodes:
            self._env = wiring.evaluation_env(self._cfg, seed, episodes)
        self._recorder = Recorder(min(episodes, calibration.EPISODES))
        return play(
            self._env,
            self._policy,
            self._params,
            seed=seed,
            version=self._version,
            act=self._act,
            on_step=self._recorder,
        )

    def _calibrate(self) -> dict[str, float]:
        recorded, unit = self._recorder.episodes(), wiring.cost_unit(self._cfg)
        return calibration.calibrate(self._predict, self._spec, self._params, recorded, unit)

    def stop(self) -> None:
        """Shortens the slice in progress; may be called from another thread."""
        self._stopped.set()
