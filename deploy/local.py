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

from common import memory
from common.config import Config
from common.metrics import MetricsWriter
from common.types import EnvSpec, UserError, replay_spec
from deploy import run_dir as runs
from deploy import signals
from deploy.weights import Holder, RayHolder
from deploy.workers import ActorWorker, EvaluatorWorker, LearnerWorker
from replay import binding
from replay.server import ReplayInfo, ReplayServer, free_port

_ROOT = Path(__file__).resolve().parent.parent
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

    def __init__(self, cfg: Config, spec: EnvSpec, directory: Path, log: Path, port: int, host: str):
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
            port=port,
            host=host,
            checkpoint_dir=directory,
        )

    def start(self) -> list[str]:
        """Sentences about damaged checkpoints, once it serves."""
        return self._server.messages

    def checkpoint(self) -> Path:
        return self._server.checkpoint()

    def info(self) -> ReplayInfo:
        return self._server.info()


class _Learner(LearnerWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, run: Path, holder: Any, address: str):
        super().__init__(cfg, spec, run, RayHolder(holder), address)


class _Actor(ActorWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any, *rest: Any):
        super().__init__(cfg, spec, RayHolder(holder), *rest)


class _Evaluator(EvaluatorWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any):
        super().__init__(cfg, spec, RayHolder(holder))


class RayWorkers:
    """The `deploy.driver.Workers` under Ray: starts a Ray of its own unless one is running in this process.

    Raises UserError when Ray cannot start.
    """

    watched = True

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path):
        self._cfg, self._spec, self._run = cfg, spec, run
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray()
        self._handles: dict[str, Any] = {}
        self._port = cfg.replay.port or free_port()
        node = ray.util.get_node_ip_address()
        self._host = binding.chosen_host(cfg.replay.host, node)
        self._address = binding.address(binding.reached_at(self._host, node), self._port)
        # What it holds comes back with the next version: Ray may restart it by itself.
        self._holder = self._start("holder", Holder, max_restarts=-1)

    def replay(self) -> RayProxy:
        places = (self._run / runs.REPLAY, self._run / runs.REPLAY_LOG, self._port, self._host)
        return RayProxy(self._start("replay", _Replay, self._cfg, self._spec, *places, env=_ON_CPU))

    def learner(self) -> RayProxy:
        arguments = (self._cfg, self._spec, self._run, self._holder, self._address)
        return RayProxy(
            self._start(
                "learner",
                _Learner,
                *arguments,
                env=memory.KEEP_FREED,
                num_gpus=_gpus(self._cfg.learner.devices),
            )
        )

    def evaluator(self) -> RayProxy:
        arguments = (self._cfg, self._spec, self._holder)
        return RayProxy(self._start("evaluator", _Evaluator, *arguments, env=_ON_CPU | _ONE_THREAD))

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> RayProxy:
        arguments = (self._run, self._cfg.logging, cfg, resume_env_steps)
        return RayProxy(self._start("metrics", MetricsWriter, *arguments))

    def actor(self, index: int, life: int, prefill: int) -> RayProxy:
        arguments = (self._cfg, self._spec, self._holder, self._address, index, life, prefill)
        return RayProxy(self._start(f"actor{index}", _Actor, *arguments, env=_ON_CPU | _ONE_THREAD))

    def close(self) -> None:
        for name in list(self._handles):
            self._end(name)
        if self._owns_ray:
            ray.shutdown()

    def _start(
        self, name: str, part: type, *args: Any, env: dict[str, str] | None = None, **needs: Any
    ) -> Any:
        self._end(name)
        # CPUs are oversubscribed on purpose: the rate limiter shares them out better than Ray can.
        remote = ray.remote(part).options(num_cpus=0, runtime_env={"env_vars": env or {}}, **needs)
        self._handles[name] = remote.remote(*args)
        return self._handles[name]

    def _end(self, name: str) -> None:
        """Also of a part that hangs: Ray kills its process after a few seconds."""
        if name in self._handles:
            with contextlib.suppress(Exception):
                ray.kill(self._handles.pop(name))


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


def _gpus(devices: int) -> int:
    """GPUs that the learner gets of those there are: `devices`, or all for 0; none where it uses the CPU."""
    there = int(ray.cluster_resources().get("GPU", 0))
    return min(devices or there, there)


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
    if isinstance(error, RayActorError):
        cause = RuntimeError("its process has ended")
        cause.__cause__ = error  # says all that Ray knows about it
        return cause
    return error
