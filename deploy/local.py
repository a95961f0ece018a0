"""The parts of a run as Ray actors, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.inference import Answer, Request
from actors.rollout import RolloutReport
from common import memory
from common.config import Config
from common.types import EnvSpec, UserError
from deploy import run_dir as runs
from deploy import shipping, signals, wiring
from deploy.accelerators import card
from deploy.cluster import Cluster, Options, Placement, ThisMachine
from deploy.joining import connect
from deploy.light_parts import Metrics, ReplayByReverb, ReplayInMemory
from deploy.replay_link import RayLink
from deploy.weights import Holder, RayHolder
from deploy.wiring import Reach
from deploy.workers import ActorWorker, EvaluatorWorker, InferenceWorker, LearnerWorker
from learner.learner import LearnerReport
from replay import binding
from replay.server import ports_from

_STORE_BYTES = 300_000_000  # object store: a few versions of the parameters at a time
_BATCHES_IN_STORE = 8  # and what the learner has fetched ahead
_ANSWER_SECONDS = 1.0  # an actor looks up from its wait for a decision this often
_PAUSE_SECONDS = 0.2  # before it asks a server again that is gone
_LATE, _GONE = object(), object()
_SPARE_CALLS = 4  # of the driver, and of actors that are being replaced

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


Handles = dict[str, Any]  # Ray actors by the names of their parts


class _Learner(LearnerWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, run: Path, holder: Any, reaches: list[Reach]):
        self._reaches = reaches
        super().__init__(cfg, spec, run, RayHolder(holder), reaches)

    def run_with(self, handles: Handles, *args: Any) -> LearnerReport:
        """`run`, with the replays of now."""
        _follow(self._reaches, handles)
        return self.run(*args)


class _Inference(InferenceWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any):
        super().__init__(cfg, spec, RayHolder(holder))


class _Client:
    """An `actors.inference.InferenceClient` of a server in a Ray actor."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._asked: Any = None  # an answer that has not come yet

    def go_to(self, handle: Any) -> None:
        """The server is this one from now on."""
        if handle != self._handle:
            self._handle, self._asked = handle, None

    def ask(self, request: Request) -> Answer | None:
        if self._asked is None:
            self._asked = self._handle.act.remote(request)
        answer = self._get(self._asked)
        if answer is not _LATE:
            self._asked = None
        return None if answer is _LATE or answer is _GONE else answer

    def version(self) -> int | None:
        version = self._get(self._handle.version.remote())
        return None if version is _LATE or version is _GONE else version

    @staticmethod
    def _get(reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=_ANSWER_SECONDS)
        except GetTimeoutError:
            return _LATE
        except RayActorError:  # until the next one is there
            time.sleep(_PAUSE_SECONDS)
            return _GONE


class _Actor(ActorWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any, server: Any, reach: Reach, *rest: Any):
        self._client = None if server is None else _Client(server)
        self._reach = reach
        super().__init__(cfg, spec, RayHolder(holder), reach, *rest, server=self._client)

    def run_with(self, handles: Handles, *args: Any) -> RolloutReport:
        """`run`, with the inference server and the replays of now."""
        if self._client is not None:
            self._client.go_to(handles["inference"])
        _follow([self._reach], handles)
        return self.run(*args)


def _follow(reaches: Sequence[Reach], handles: Handles) -> None:
    """Leads links to the replays of now; an address stays what it is."""
    for reach in reaches:
        if isinstance(reach, RayLink):
            reach.go_to(handles[reach.part])


class _InformedProxy(RayProxy):
    """Tells a part with every slice of work where the others are that it asks."""

    def __init__(self, handle: Any, handles: Callable[[], Handles]):
        super().__init__(handle)
        self._handles = handles

    def call(self, method: str, *args: Any) -> Future[Any]:
        if method == "run":
            return super().call("run_with", self._handles(), *args)
        return super().call(method, *args)


class _Evaluator(EvaluatorWorker):
    def __init__(self, cfg: Config, spec: EnvSpec, holder: Any):
        super().__init__(cfg, spec, RayHolder(holder))


class RayWorkers:
    """The `deploy.driver.Workers` under Ray: on the configured cluster, else under a Ray of its own, unless
    this process has joined or started one already.

    Raises UserError when Ray cannot start, and when the cluster cannot be reached or has no room.
    """

    watched = True

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path):
        self._cfg, self._spec, self._run = cfg, spec, run
        self._handles: dict[str, Any] = {}
        self._place: Placement | None = None
        self._owns_ray = not ray.is_initialized()
        self._by_reverb = cfg.replay.server == "reverb"
        self._replays = [f"replay{shard}" for shard in range(cfg.replay.shards)]
        try:
            if self._owns_ray:
                connect(cfg.ray) if cfg.ray.address else start_ray(wiring.batch_bytes(cfg, spec))
            place = self._place = Cluster(cfg, run) if cfg.ray.address else ThisMachine(cfg)
            self.central = place.central
            self._ports = ports_from(cfg.replay, place.free_ports) if self._by_reverb else []
            self._host = binding.chosen_host(cfg.replay.host, place.host)
            # What it holds comes back with the next version: Ray may restart it by itself.
            self._holder = self._start("holder", Holder, place=place.beside_driver() | {"max_restarts": -1})
        except BaseException:
            self.close()
            raise

    def replay(self, shard: int) -> RayProxy:
        name, place = self._replays[shard], self._placed.replay()
        arguments = wiring.replay_arguments(self._cfg, self._spec, shard) | {
            "checkpoint_dir": runs.replay_dir(self._run, shard, self._cfg.replay.shards)
        }
        if self._by_reverb:
            arguments |= {"port": self._ports[shard], "host": self._host}
            handle = self._start(name, ReplayByReverb, self._run, arguments, place=place, env=_ON_CPU)
        else:
            calls = {"max_concurrency": self._cfg.actors.count + _SPARE_CALLS}
            env = memory.KEEP_FREED | _ON_CPU
            handle = self._start(name, ReplayInMemory, arguments, place=place | calls, env=env)
        return RayProxy(handle)

    def learner(self) -> RayProxy:
        arguments = (self._cfg, self._spec, self._run, self._holder, self._reaches())
        place = self._placed.learner()
        env = memory.KEEP_FREED | card(place)
        handle = self._start("learner", _Learner, *arguments, place=place, env=env)
        return _InformedProxy(handle, self._asked)

    def inference(self) -> RayProxy:
        arguments = (self._cfg, self._spec, self._holder)
        place = self._placed.inference()
        calls = {"max_concurrency": self._cfg.actors.count + _SPARE_CALLS}
        return RayProxy(
            self._start("inference", _Inference, *arguments, place=place | calls, env=card(place))
        )

    def evaluator(self) -> RayProxy:
        arguments = (self._cfg, self._spec, self._holder)
        place = self._placed.evaluator()
        env = card(place) if place.get("num_gpus") else _ON_CPU | _ONE_THREAD
        return RayProxy(self._start("evaluator", _Evaluator, *arguments, place=place, env=env))

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> RayProxy:
        environ = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        arguments = (environ, self._run, self._cfg.logging, cfg, resume_env_steps)
        return RayProxy(self._start("metrics", Metrics, *arguments, place=self._placed.beside_driver()))

    def actor(self, index: int, life: int, prefill: int) -> RayProxy:
        reaches, server = self._reaches(), self._handles.get("inference")
        reach = reaches[index % len(reaches)]
        arguments = (self._cfg, self._spec, self._holder, server, reach, index, life, prefill)
        place, env = self._placed.actor(index), _ON_CPU | _ONE_THREAD
        handle = self._start(f"actor{index}", _Actor, *arguments, place=place, env=env)
        return _InformedProxy(handle, self._asked)

    def close(self) -> None:
        for name in reversed(list(self._handles)):  # whoever asks ends before who answers
            self._end(name)
        if self._place is not None:
            self._place.close()
        if self._owns_ray:
            ray.shutdown()

    def _reaches(self) -> list[Reach]:
        """What leads to the replay servers of now."""
        if self._by_reverb:
            reached = binding.reached_at(self._host, self._placed.host)
            return [binding.address(reached, port) for port in self._ports]
        return [RayLink(self._handles[part], part) for part in self._replays]

    def _asked(self) -> Handles:
        """The parts that others ask, not the driver alone."""
        asked = ["inference"] * self.central + ([] if self._by_reverb else self._replays)
        return {part: self._handles[part] for part in asked}

    @property
    def _placed(self) -> Placement:
        assert self._place is not None
        return self._place

    def _start(
        self, name: str, part: type, *args: Any, place: Options, env: dict[str, str] | None = None
    ) -> Any:
        self._end(name)
        remote = ray.remote(part).options(runtime_env={"env_vars": env or {}}, **place)
        self._handles[name] = remote.remote(*args)
        return self._handles[name]

    def _end(self, name: str) -> None:
        """Also of a part that hangs: Ray kills its process after a few seconds."""
        if name in self._handles:
            with contextlib.suppress(Exception):
                ray.kill(self._handles.pop(name))


def start_ray(batch_bytes: int = 0) -> None:
    """A Ray on this machine for this process alone. Raises UserError with the nearest right thing to do.

    Args:
        batch_bytes: of the batches that replay sends through Ray's shared memory.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    # Every part has an environment of its own: workers that are started in advance would stay idle.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Nobody can ask this Ray what calls there were, and it would keep the last 100,000.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    # Ray's helpers import for longer than its 30 s on a busy laptop; its end would be ours, without a word.
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray would write escape codes into files, too
    path = os.pathsep.join(filter(None, [str(shipping.ROOT), os.environ.get("PYTHONPATH")]))
    try:
        with signals.held_back():  # Ray would take the handler of SIGTERM, and its processes would see Ctrl-C
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",  # nobody else shall reach it, and it needs no network
                include_dashboard=False,
                configure_logging=True,
                logging_level="error",
                log_to_driver=True,
                object_store_memory=_STORE_BYTES + _BATCHES_IN_STORE * batch_bytes,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
    except Exception as error:
        raise UserError(
            f"Ray did not start ({' '.join(str(error).split())[:300]}); `safedreamer doctor` checks it, and "
            "--backend inline trains without it"
        ) from error


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
