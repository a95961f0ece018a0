"""Everything in one process, one thread per part, without Ray: for debugging, tests and small machines.

Only a Reverb server is a child process: Reverb must not sample in its own server's process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from actors.inference import Answer, Request
from common.config import Config
from common.metrics import MetricsWriter
from common.types import EnvSpec
from deploy import run_dir as runs
from deploy import wiring
from deploy.light_parts import ReplayInMemory
from deploy.weights import Holder
from deploy.workers import ActorWorker, EvaluatorWorker, InferenceWorker, LearnerWorker
from replay import binding
from replay.memory.link import DirectLink
from replay.memory.server import MemoryServer
from replay.memory.table import MemoryTable
from replay.process import spawn_server
from replay.server import free_ports, ports_from


class ThreadProxy:
    """Makes an object in a thread of its own and calls it there, one call after another."""

    def __init__(self, name: str, make: Callable[[], Any]):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._target = self._executor.submit(make)

    @property
    def target(self) -> Any:
        """The object, as soon as it is made."""
        return self._target.result()

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._executor.submit(lambda: getattr(self.target, method)(*args))

    def close(self) -> None:
        """Tells the object to stop, also in the middle of a call, closes it there and ends the thread."""
        if not self._target.done() or self._target.exception() is None:
            target = self.target
            if hasattr(target, "stop"):
                target.stop()  # only sets a flag; `close` must not run beside the call that it shortens
            if hasattr(target, "close"):
                self.call("close").exception()
        self._executor.shutdown(wait=True)


class _ReverbReplay:
    """A Reverb server as a child process, with the calls that the driver makes."""

    def __init__(self, arguments: dict[str, Any], port: int, host: str, log: Path):
        self._server = spawn_server(**arguments, port=port, host=host, log=log)
        self.checkpoint, self.info = self._server.checkpoint, self._server.info
        self.close = self._server.stop

    def start(self) -> list[str]:
        """Sentences about damaged checkpoints."""
        return self._server.messages


class _ReverbServers:
    """Reverb servers and their addresses."""

    def __init__(self, cfg: Config, log: Path):
        self._ports, self._log = ports_from(cfg.replay, free_ports), log
        self._host = binding.chosen_host(cfg.replay.host, binding.LOOPBACK)
        reached = binding.reached_at(self._host)
        self.reaches = [binding.address(reached, port) for port in self._ports]

    def make(self, shard: int, arguments: dict[str, Any]) -> _ReverbReplay:
        return _ReverbReplay(arguments, self._ports[shard], self._host, self._log)


class _MemoryTables:
    """Tables of this process and the ways to them."""

    def __init__(self, cfg: Config):
        self._servers: dict[int, MemoryServer] = {}
        self.reaches = [DirectLink(partial(self._table, shard)) for shard in range(cfg.replay.shards)]

    def make(self, shard: int, arguments: dict[str, Any]) -> ReplayInMemory:
        self._servers.pop(shard, None)
        replay = ReplayInMemory(arguments)
        self._servers[shard] = replay.server
        return replay

    def _table(self, shard: int) -> MemoryTable | None:
        server = self._servers.get(shard)
        return None if server is None else server.table


class _Client:
    """An `actors.inference.InferenceClient` of a server in this process, also of the one after it."""

    def __init__(self, server: Callable[[], InferenceWorker]):
        self._server = server

    def ask(self, request: Request) -> Answer:
        return self._server().act(request)

    def version(self) -> int:
        return self._server().version()


class InlineWorkers:
    """The `deploy.driver.Workers` of one process."""

    watched = False  # nothing can end a thread that hangs, and whoever debugs one shall have time

    def __init__(self, cfg: Config, spec: EnvSpec, run: Path):
        self._cfg, self._spec, self._run = cfg, spec, run
        self.central = wiring.central_inference(cfg, gpus=0)
        self._holder = Holder()
        log = run / runs.REPLAY_LOG
        self._replays = _MemoryTables(cfg) if cfg.replay.server == "memory" else _ReverbServers(cfg, log)
        self._proxies: dict[str, ThreadProxy] = {}

    def replay(self, shard: int) -> ThreadProxy:
        arguments = wiring.replay_arguments(self._cfg, self._spec, shard) | {
            "checkpoint_dir": runs.replay_dir(self._run, shard, self._cfg.replay.shards)
        }
        return self._start(f"replay{shard}", lambda: self._replays.make(shard, arguments))

    def learner(self) -> ThreadProxy:
        arguments = (self._cfg, self._spec, self._run, self._holder, self._replays.reaches)
        return self._start("learner", lambda: LearnerWorker(*arguments))

    def evaluator(self) -> ThreadProxy:
        return self._start("evaluator", lambda: EvaluatorWorker(self._cfg, self._spec, self._holder))

    def metrics(self, cfg: dict[str, Any], resume_env_steps: int | None) -> ThreadProxy:
        arguments = (self._run, self._cfg.logging, cfg, resume_env_steps)
        return self._start("metrics", lambda: MetricsWriter(*arguments))

    def inference(self) -> ThreadProxy:
        return self._start("inference", lambda: InferenceWorker(self._cfg, self._spec, self._holder))

    def actor(self, index: int, life: int, prefill: int) -> ThreadProxy:
        client = _Client(lambda: self._proxies["inference"].target) if self.central else None
        reach = self._replays.reaches[index % len(self._replays.reaches)]
        arguments = (self._cfg, self._spec, self._holder, reach, index, life, prefill, client)
        return self._start(f"actor{index}", lambda: ActorWorker(*arguments))

    def close(self) -> None:
        for name in reversed(self._proxies):  # the replay server last: it was started first
            self._proxies[name].close()

    def _start(self, name: str, make: Callable[[], Any]) -> ThreadProxy:
        if name in self._proxies:
            self._proxies[name].close()
        self._proxies[name] = ThreadProxy(name, make)
        return self._proxies[name]
