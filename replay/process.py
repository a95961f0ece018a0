"""The replay server as a child process, without Ray. The child dies with its parent.

Parent and child exchange lines of JSON over the child's standard input and output; `python -m
replay.process` is the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.config import ReplayConfig
from common.types import ArraySpec, UserError
from replay.binding import LOOPBACK
from replay.server import ReplayServer
from replay.table import ReplayInfo

_ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 2.0  # the child looks this often whether its parent still lives


class ServerProcess:
    """A `ReplayServer` in a child process: `port`, `pid`, `messages` (damaged checkpoints), `restored`."""

    def __init__(self, child: subprocess.Popen[str], ready_timeout: float):
        self._child = child
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.pid = child.pid
        threading.Thread(target=self._read, name="replay-server-replies", daemon=True).start()
        ready = self._await_reply(0, ready_timeout)
        self.port: int = ready["port"]
        self.messages: list[str] = ready["messages"]
        self.restored: Path | None = Path(ready["restored"]) if ready["restored"] else None

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child.poll() is None

    def checkpoint(self, timeout: float = 3600.0) -> Path:
        """See `ReplayServer.checkpoint`. RuntimeError: the server is dead; TimeoutError: no reply in time."""
        return Path(self._ask("checkpoint", timeout)["path"])

    def info(self, timeout: float = 30.0) -> ReplayInfo:
        """See `ReplayServer.info`; errors as in `checkpoint`."""
        return ReplayInfo(**self._ask("info", timeout))

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the process, by force after `timeout` seconds."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()  # the child takes it for the death of its parent
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _ask(self, request: str, timeout: float) -> dict[str, Any]:
        with self._lock:
            number = next(self._numbers)
            try:
                assert self._child.stdin is not None
                print(json.dumps([number, request]), file=self._child.stdin, flush=True)
            except (BrokenPipeError, ValueError) as error:
                raise RuntimeError(f"The replay server is gone (exit code {self._child.poll()}).") from error
            return self._await_reply(number, timeout)

    def _await_reply(self, number: int, timeout: float) -> dict[str, Any]:
        while True:
            try:
                reply = self._replies.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"The replay server did not reply within {timeout:.0f} s.") from None
            if reply is None:
                self._replies.put(None)
                raise RuntimeError(f"The replay server is gone (exit code {self._child.wait()}).")
            if reply["number"] != number:  # the late answer to a request that timed out
                continue
            if "error" in reply:
                raise (UserError if reply["user"] else RuntimeError)(reply["error"])
            return reply["result"]

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._replies.put(json.loads(line))
        self._replies.put(None)


def spawn_server(
    signature: Mapping[str, ArraySpec],
    cfg: ReplayConfig,
    *,
    batch_length: int,
    train_ratio: float,
    batch_size: int,
    min_steps: int,
    streams: int = 1,
    port: int | None = None,
    host: str = LOOPBACK,
    checkpoint_dir: Path | None = None,
    log: Path | None = None,
    ready_timeout: float = 600.0,
) -> ServerProcess:
    """Starts a `ReplayServer` (same arguments, same errors) in a child process and waits until it serves.

    Its standard error, where Reverb logs, goes to the end of the file `log`, else to ours. Restoring a
    checkpoint may take minutes: `ready_timeout` seconds are granted.
    """
    arguments = {
        "signature": {name: dataclasses.asdict(spec) for name, spec in signature.items()},
        "cfg": dataclasses.asdict(cfg),
        "batch_length": batch_length,
        "train_ratio": train_ratio,
        "batch_size": batch_size,
        "min_steps": min_steps,
        "streams": streams,
        "port": port,
        "host": host,
        "checkpoint_dir": None if checkpoint_dir is None else str(checkpoint_dir),
    }
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    errors = None if log is None else open(log, "a")  # noqa: SIM115 (closed below, the child has its own copy)
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "replay.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C shall reach the parent alone, which saves before it stops us
        )
    finally:
        if errors is not None:
            errors.close()
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: the missing reply says so
            print(json.dumps(arguments), file=child.stdin, flush=True)
        return ServerProcess(child, ready_timeout)
    except BaseException:
        child.kill()
        child.wait()
        raise


def main() -> None:
    """The child: serves until its standard input closes or its parent is gone."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()

    def reply(number: int, work: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer: dict[str, Any] = {"number": number, "result": work()}
        except Exception as error:
            answer = {"number": number, "error": str(error), "user": isinstance(error, UserError)}
        print(json.dumps(answer), file=replies, flush=True)
        return "result" in answer

    servers: list[ReplayServer] = []

    def start() -> dict[str, Any]:
        servers.append(_build(json.loads(sys.stdin.readline())))
        restored = None if servers[0].restored is None else str(servers[0].restored)
        return {"port": servers[0].port, "messages": servers[0].messages, "restored": restored}

    if not reply(0, start):
        sys.exit(1)
    server = servers[0]
    requests: dict[str, Callable[[], dict[str, Any]]] = {
        "checkpoint": lambda: {"path": str(server.checkpoint())},
        "info": lambda: dataclasses.asdict(server.info()),
    }
    for line in sys.stdin:
        number, request = json.loads(line)
        reply(number, requests[request])
    server.stop()


def _build(arguments: dict[str, Any]) -> ReplayServer:
    signature = {
        name: ArraySpec(tuple(spec["shape"]), spec["dtype"])
        for name, spec in arguments.pop("signature").items()
    }
    directory = arguments.pop("checkpoint_dir")
    return ReplayServer(
        signature,
        ReplayConfig(**arguments.pop("cfg")),
        checkpoint_dir=None if directory is None else Path(directory),
        **arguments,
    )


def _die_with_parent(parent: int) -> None:
    """Ends the process even in the middle of a save, when the parent was killed."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
