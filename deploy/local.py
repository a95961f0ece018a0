"""The parts of a run as Ray actors on this machine."""

from __future__ import annotations

import contextlib
import os
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from common.config import Config
from common.metrics import MetricsWriter
from common.types import EnvSpec, UserError, replay_spec
from deploy import run_dir as runs
from deploy import signals
from deploy.weights import Holder, RayHolder
from deploy.workers import ActorWorker, EvaluatorWorker, LearnerWorker
from replay.server import ReplayServer

_ROOT = Path(__file__).resolve().parent.parent
_READY_SECONDS = 600.0  # restoring a large replay buffer takes minutes
_STORE_BYTES = 300_000_000  # object store: a few versions of the parameters at a time

# Actors share the machine with the learner, and small policies gain nothing from more threads.
_ON_CPU = {"JAX_PLATFORMS": "cpu"}
_ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class RayProxy:
    """Calls to a Ray actor as futures of the standard library."""

    def __init__(self, handle: Any):
        self._handle = handle

    def call(self, method: str, *args: Any) -> Future[Any]:
        """The call's result, or the error that the part itself raised, without Ray's traceback around it."""
        answer: Future[Any] = Future()
        getattr(self._handle, method).remote(*args).future().add_done_callback(
            lambda done: _settle(answer, done)
        )
        return answer


class _Replay:
    """A replay server in a process of its own; what Reverb says goes to a file, not across the view."""

    def __init__(self, cfg: Config, spec: EnvSpec, directory: Path, log: Path):
        with open(log, "a") as file:
            os.dup2(file.fileno(), 2)
        self._server = ReplayServer(
            replay_spec(spec),
            cfg.replay,
            batch_length=cfg.learner.batch_length,
            train_ratio=cfg.learner.train_ratio,
            batch_size=cfg.learner.batch_size,
            min_steps=cfg.learner.prefill,
            streams=cfg.actors.count * cfg.actors.envs,
            checkpoint_dir=directory,
        )

    def where(self) -> tuple[str, list[str]]:
        """Its address, and sentences about damaged checkpoints."""
        return f"{ray.util.get_node_ip_address()}:{self._server.port}", self._server.messages

    def checkpoint(self) -> Path:
        return self._server.checkpoint()


class _Learner(LearnerWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, run: Path, holder: Any, address: str):
        super().__init__(cfg, spec, run, RayHolder(holder).put, address)


class _Actor(ActorWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any, *rest: Any):
        super().__init__(cfg, spec, RayHolder(holder), *rest)


class _Evaluator(EvaluatorWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any):
        super().__init__(cfg, spec, RayHolder(holder))


class RayWorkers:
    """The `deploy.driver.Workers` under Ray: starts a Ray of its own unless one is running in this process.

    Raises UserError when Ray or the replay server cannot start.
    """

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path):
        self._cfg, self._spec, self._run = cfg, spec, run
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray()
        self._handles: list[Any] = []
        self._actors: dict[int, Any] = {}
        try:
            self._holder = self._start(Holder)
            log = run / runs.REPLAY_LOG
            self.replay = RayProxy(self._start(_Replay, cfg, spec, run / runs.REPLAY, log, env=_ON_CPU))
            self._address, self.messages = self.replay.call("where").result(_READY_SECONDS)
            arguments = (cfg, spec, run, self._holder, self._address)
            self.learner = RayProxy(self._start(_Learner, *arguments, gpu=_gpus()))
            self.evaluator = RayProxy(
                self._start(_Evaluator, cfg, spec, self._holder, env=_ON_CPU | _ONE_THREAD)
            )
        except BaseException:
            self.close()
            raise

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> RayProxy:
        return RayProxy(self._start(MetricsWriter, self._run, self._cfg.logging, cfg, resume_env_steps))

    def actor(self, index: int, life: int, prefill: int) -> RayProxy:
        """Starts an actor; one of the same number has failed, and what is left of it goes."""
        if index in self._actors:
            self._end(self._actors.pop(index))
        arguments = (self._cfg, self._spec, self._holder, self._address, index, life, prefill)
        self._actors[index] = self._start(_Actor, *arguments, env=_ON_CPU | _ONE_THREAD)
        return RayProxy(self._actors[index])

    def close(self) -> None:
        for handle in list(self._handles):
            self._end(handle)
        if self._owns_ray:
            ray.shutdown()

    def _end(self, handle: Any) -> None:
        self._handles.remove(handle)
        with contextlib.suppress(Exception):
            ray.kill(handle)

    def _start(self, part: type, *args: Any, env: dict[str, str] | None = None, gpu: float = 0) -> Any:
        # CPUs are oversubscribed on purpose: the rate limiter shares them out better than Ray can.
        remote = ray.remote(num_cpus=0, num_gpus=gpu)(part)
        handle = remote.options(runtime_env={"env_vars": env or {}}).remote(*args)
        self._handles.append(handle)
        return handle


def start_ray() -> None:
    """A Ray on this machine for this process alone. Raises UserError with the nearest right thing to do."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    # Ray's helpers import for longer than its 30 s on a busy laptop; its end would be ours, without a word.
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray would write escape codes into files, too
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    try:
        with signals.held_back():  # Ray would take the handler of SIGTERM, and its processes would see Ctrl-C
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",  # nobody else shall reach it, and it needs no network
                include_dashboard=False,
                configure_logging=True,
                logging_level="error",
                log_to_driver=True,
                object_store_memory=_STORE_BYTES,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
    except Exception as error:
        raise UserError(
            f"Ray did not start ({' '.join(str(error).split())[:300]}); `safedreamer doctor` checks it, and "
            "--backend inline trains without it"
        ) from error


def _gpus() -> float:
    return 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0


def _settle(answer: Future[Any], done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    else:
        answer.set_exception(_root_cause(error))


def _root_cause(error: BaseException) -> BaseException:
    """What a part raised. Ray keeps the exception of a call, and only the text of one in a constructor."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        cause.__cause__ = error  # its text is the traceback in the other process
        return cause
    if isinstance(error, RayActorError) and error.actor_init_failed:
        text = str(error)
        _, user_error, sentence = text.rpartition(f"{UserError.__name__}: ")
        cause = UserError(sentence.strip()) if user_error else RuntimeError(text.rstrip().rpartition("\n")[2])
        cause.__cause__ = error
        return cause
    return error
