"""Everything in one process, one thread per part, without Ray: for debugging, tests and small machines.

Only the replay server is a child process: Reverb must not sample in its own server's process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.config import Config
from common.metrics import MetricsWriter
from common.types import EnvSpec, replay_spec
from deploy import run_dir as runs
from deploy.weights import Holder
from deploy.workers import ActorWorker, EvaluatorWorker, LearnerWorker
from replay.process import spawn_server


class ThreadProxy:
    """Makes an object in a thread of its own and calls it there, one call after another."""

    def __init__(self, name: str, make: Callable[[], Any]):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._target = self._executor.submit(make)

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._executor.submit(lambda: getattr(self._target.result(), method)(*args))

    def close(self) -> None:
        """Tells the object to stop, also in the middle of a call, closes it there and ends the thread."""
        if not self._target.done() or self._target.exception() is None:
            target = self._target.result()
            if hasattr(target, "stop"):
                target.stop()  # only sets a flag; `close` must not run beside the call that it shortens
            if hasattr(target, "close"):
                self.call("close").exception()
        self._executor.shutdown(wait=True)


class InlineWorkers:
    """The `deploy.driver.Workers` of one process. Raises UserError when replay cannot start."""

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path):
        self._cfg, self._spec, self._run = cfg, spec, run
        self._holder = Holder()
        self._server = spawn_server(
            replay_spec(spec),
            cfg.replay,
            batch_length=cfg.learner.batch_length,
            train_ratio=cfg.learner.train_ratio,
            batch_size=cfg.learner.batch_size,
            min_steps=cfg.learner.prefill,
            streams=cfg.actors.count * cfg.actors.envs,
            checkpoint_dir=run / runs.REPLAY,
            log=run / runs.REPLAY_LOG,
        )
        self.messages = self._server.messages
        address = self._address = f"localhost:{self._server.port}"
        put = self._holder.put
        self.replay = ThreadProxy("replay", lambda: self._server)
        self.learner = ThreadProxy("learner", lambda: LearnerWorker(cfg, spec, run, put, address))
        self.evaluator = ThreadProxy("evaluator", lambda: EvaluatorWorker(cfg, spec, self._holder))
        self._actors: dict[int, ThreadProxy] = {}
        self._metrics: ThreadProxy | None = None

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> ThreadProxy:
        logging_cfg = self._cfg.logging
        make = lambda: MetricsWriter(self._run, logging_cfg, cfg, resume_env_steps)  # noqa: E731
        self._metrics = ThreadProxy("metrics", make)
        return self._metrics

    def actor(self, index: int, life: int, prefill: int) -> ThreadProxy:
        """Starts an actor; one of the same number has failed, and what is left of it goes."""
        if index in self._actors:
            self._actors.pop(index).close()
        arguments = (self._cfg, self._spec, self._holder, self._address, index, life, prefill)
        self._actors[index] = ThreadProxy(f"actor{index}", lambda: ActorWorker(*arguments))
        return self._actors[index]

    def close(self) -> None:
        parts = [*self._actors.values(), self.evaluator, self.learner, self._metrics]
        for proxy in parts:
            if proxy is not None:
                proxy.close()
        self._server.stop()
