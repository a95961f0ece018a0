"""Parts of a run whose answers the tests give, and runs of the control loop with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from actors.inference_server import InferenceReport
from actors.rollout import RolloutReport
from common.config import Config
from common.configuration import from_dict
from common.status import Status
from common.types import ArraySpec, EnvSpec, EpisodeResult
from common.versions import Stretch
from deploy.driver import Driver
from deploy.outcome import Outcome
from deploy.workers import EvaluationReport, Started
from learner.learner import LearnerReport
from replay.table import ReplayInfo

SPEC = EnvSpec("Fake", {"vector": ArraySpec((1,))}, 1, 5, 100)
MADE_WITH = [Stretch(0, {"mujoco": "2.3.3"})]
SLICE = 30  # env steps that a fake actor reports per slice
BATCH_STEPS = 8  # agent steps per fake update


def config(**changes: Any) -> Config:
    values = {
        "env_steps": 300,
        "actors": {"count": 2, "slice_seconds": 0.01},
        "learner": {"batch_size": 2, "batch_length": 4, "prefill": 11},
        "evaluation": {"every": 0, "episodes": 3, "final_episodes": 4},
        "logging": {"every_seconds": 0.02},
        "supervision": {"backoff_seconds": 0.01, "max_failures": 3},
    }
    return from_dict(values | changes, "test")


def episode(number: int, source: str = "actor0/env0") -> EpisodeResult:
    return EpisodeResult(float(number), 2.0, 100, 1, source)


def evaluation(seconds: float, episodes: int) -> EvaluationReport:
    results = [episode(5, f"eval/env{i}") for i in range(episodes)]
    return EvaluationReport(results, {"model/cost_recall": 0.5})


def in_a_while(result: Any, seconds: float = 0.1) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(result, BaseException):
        threading.Timer(seconds, future.set_exception, [result]).start()
    else:
        threading.Timer(seconds, future.set_result, [result]).start()
    return future


class Part:
    """Answers calls with what its behaviour returns (a value or a future) or raises."""

    def __init__(self, name: str, workers: FakeWorkers):
        self.name, self._workers = name, workers

    def call(self, method: str, *args: Any) -> Future[Any]:
        self._workers.calls.append((self.name, method, args))
        answer: Future[Any] = Future()
        try:
            result = self._workers.answer(self.name, method, args)
        except Exception as error:
            answer.set_exception(error)
            return answer
        if isinstance(result, Future):
            return result
        answer.set_result(result)
        return answer


class FakeWorkers:
    """`calls` lists (part, method, arguments); `on` replaces a behaviour, e.g. on["actor0", "run"]."""

    def __init__(self) -> None:
        self.watched = True
        self.central = False
        self.calls: list[tuple[str, str, tuple]] = []
        self.launched: list[tuple[int, int, int]] = []  # (index, life, prefill)
        self.metrics_at: list[int | None] = []
        self.on: dict[tuple[str, str], Callable[..., Any]] = {}
        self.updates = 0

    def replay(self, shard: int) -> Part:
        return Part(f"replay{shard or ''}", self)

    def learner(self) -> Part:
        return Part("learner", self)

    def inference(self) -> Part:
        return Part("inference", self)

    def evaluator(self) -> Part:
        return Part("evaluator", self)

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> Part:
        self.metrics_at.append(resume_env_steps)
        return Part("metrics", self)

    def actor(self, index: int, life: int, prefill: int) -> Part:
        self.launched.append((index, life, prefill))
        return Part(f"actor{index}", self)

    def close(self) -> None: ...

    def answer(self, name: str, method: str, args: tuple) -> Any:
        custom = self.on.get((name, method)) or self.on.get((name.rstrip("0123456789"), method))
        if custom is not None:
            return custom(*args)
        kind = name.rstrip("0123456789")
        return getattr(self, f"{kind}_{method}", lambda *args: None)(*args)

    def replay_start(self) -> list[str]:
        return []

    def replay_info(self) -> ReplayInfo:
        return ReplayInfo(10, len(self.calls), 0)

    def learner_start(self, resume: bool) -> Started:
        return Started(None, 0.5, "cpu")

    def learner_run(self, seconds: float, episodes: list, env_steps: int) -> LearnerReport:
        if seconds == 0:
            return LearnerReport(updates=self.updates)
        self.updates += 1
        return LearnerReport(self.updates, BATCH_STEPS, 0.01, 0.0, self.updates)

    def inference_report(self) -> InferenceReport:
        return InferenceReport(1, 3, {"inference/batch": 4.0})

    def actor_run(self, seconds: float, max_env_steps: int, newest: int) -> RolloutReport:
        time.sleep(0.002)
        return RolloutReport(env_steps=min(SLICE, max_env_steps), agent_steps=6, seconds=0.01, version=1)

    def evaluator_evaluate(self, seconds: float, episodes: int) -> EvaluationReport:
        return evaluation(seconds, episodes)

    def of(self, name: str, method: str) -> list[tuple]:
        """Arguments of the calls of one method, in order."""
        return [args for part, called, args in self.calls if (part, called) == (name, method)]


def drive(workers: FakeWorkers, cfg: Config | None = None, resume: bool = False) -> Outcome:
    cfg = cfg or config()
    status = Status("fake", "Fake", "nano", 0, Path("nowhere"), cfg.env_steps)
    return Driver(cfg, SPEC, Path("nowhere"), workers, status, MADE_WITH).run(resume)


def saved_meta(workers: FakeWorkers) -> dict[str, Any]:
    return workers.of("learner", "save")[-1][0]


def resumed_from(meta: dict[str, Any], updates: int = 7) -> Callable[[bool], Started]:
    return lambda resume: Started(meta | {"updates": updates, "version": 3}, 0.0, "cpu")
