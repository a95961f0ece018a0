"""The replay server: one table of windows, its rate limiter, its checkpoints. Give it its own process."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.config import ReplayConfig
from common.types import ArraySpec, UserError
from replay import backend, binding
from replay.storage import CheckpointStore
from replay.table import ReplayInfo, table_spec

_PORT_SECONDS = 30.0  # how long a predecessor that was just killed may hold the port


class ReplayServer:
    """Serves one table: uniform sampling, oldest out first, samples tied to inserts by `train_ratio`.

    With a `checkpoint_dir` the newest intact checkpoint is restored first; `restored` names it and
    `messages` holds sentences about damaged ones, for the caller to log. `streams` is the number of
    environments that write. `port` (0 picks one) stays the same over restarts, so that
    writers and samplers find the server again: choose it once and pass it to every restart. It answers only
    at the address `host` of this machine (`replay.binding`).

    Raises UserError when the port is taken or cannot be kept to the address, when the checkpoint belongs to
    another table definition (naming the field), and where there is no Reverb. Do not sample in the server's
    own process.
    """

    def __init__(
        self,
        signature: Mapping[str, ArraySpec],
        cfg: ReplayConfig,
        *,
        batch_length: int,
        train_ratio: float,
        batch_size: int,
        min_steps: int,
        streams: int = 1,
        port: int | None = None,
        host: str = binding.LOOPBACK,
        checkpoint_dir: Path | None = None,
    ):
        binding.check_host(host)
        self.spec = table_spec(
            signature,
            cfg,
            batch_length=batch_length,
            train_ratio=train_ratio,
            batch_size=batch_size,
            min_steps=min_steps,
            streams=streams,
        )
        self.messages: list[str] = []
        self.restored: Path | None = None
        self._store = CheckpointStore(checkpoint_dir, self.spec) if checkpoint_dir is not None else None
        self.port = port or free_ports(1)[0]
        _await_port(self.port)
        reverb = backend.load(cfg.import_mode)
        self._server: Any = None
        self._gate = binding.Gate(host, self.port)
        try:
            self._server = self._restored(reverb)
            self._gate.check()
        except BaseException:
            self.stop()
            raise
        address = binding.address(binding.reached_at(host), self.port)
        self._client = backend.connect(address, cfg.import_mode)

    def checkpoint(self) -> Path:
        """Saves the table and returns the directory. Older checkpoints survive a failure (UserError)."""
        if self._store is None:
            raise RuntimeError("This replay server was started without a checkpoint directory.")
        try:
            return self._store.adopt(Path(self._client.checkpoint()))
        except (RuntimeError, OSError) as error:
            raise self._store.not_saved(error) from error

    def info(self) -> ReplayInfo:
        """What is in the table now, and what went through it."""
        table = self._client.server_info(timeout=10)[backend.TABLE]
        limiter = table.rate_limiter_info
        return ReplayInfo(table.current_size, limiter.insert_stats.completed, limiter.sample_stats.completed)

    def stop(self) -> None:
        """Ends the service; writers and samplers that wait for it go on waiting."""
        if self._server is not None:
            self._server.stop()
        self._gate.close()

    def _restored(self, reverb: Any) -> Any:
        """The server with the newest checkpoint that Reverb can read."""
        refused: dict[Path, str] = {}
        while True:
            if self._store is not None:
                self.restored, self.messages = self._store.newest(refused)
            try:
                return self._start(reverb)
            except RuntimeError as error:
                if self.restored is None:
                    raise
                refused[self.restored] = str(error)

    def _start(self, reverb: Any) -> Any:
        spec = self.spec
        checkpointer = None
        if self._store is not None:
            # Reverb restores the fallback because its own directory is empty.
            fallback = None if self.restored is None else str(self.restored)
            checkpointer = reverb.checkpointers.DefaultCheckpointer(
                str(self._store.scratch), fallback_checkpoint_path=fallback
            )
        table = reverb.Table(
            name=backend.TABLE,
            sampler=reverb.selectors.Uniform(),
            remover=reverb.selectors.Fifo(),
            max_size=spec.max_size,
            rate_limiter=reverb.rate_limiters.SampleToInsertRatio(
                spec.samples_per_insert, spec.min_size, spec.error_range
            ),
        )
        return reverb.Server([table], port=self.port, checkpointer=checkpointer)


def ports_from(cfg: ReplayConfig, free: Callable[[int], list[int]]) -> list[int]:
    """One per shard: those that follow `cfg.port`, or so many that are `free`."""
    return list(range(cfg.port, cfg.port + cfg.shards)) if cfg.port else free(cfg.shards)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:  # held until all are found, so that they differ
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _await_port(port: int) -> None:
    """Raises UserError when the port stays taken: Reverb would share it and serve half of the requests."""
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind(("", port))
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"Port {port} for the replay server can not be used ({error.strerror}): "
                        "choose another --replay.port, or 0 for a free one."
                    ) from error
        time.sleep(0.2)
