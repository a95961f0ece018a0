"""The parts of a run under Ray that need no JAX.

Their processes import this module alone, and with it a small part of what actors and learner import: they
start, and start again, that much sooner.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.metrics import MetricsWriter
from deploy import run_dir as runs
from replay.memory.server import MemoryServer
from replay.memory.table import Appended, Block, Columns
from replay.server import ReplayServer
from replay.table import ReplayInfo


class ReplayByReverb:
    """A Reverb server in a process of its own; what Reverb says goes to a file, not across the view.

    Args:
        arguments: of `ReplayServer`: its table, its address, and where its checkpoints lie.
    """

    def __init__(self, run: Path, arguments: dict[str, Any]):
        with open(run / runs.REPLAY_LOG, "a") as file:
            os.dup2(file.fileno(), 2)
        self._server = ReplayServer(**arguments)

    def start(self) -> list[str]:
        """Sentences about damaged checkpoints, once it serves."""
        return self._server.messages

    def checkpoint(self) -> Path:
        return self._server.checkpoint()

    def info(self) -> ReplayInfo:
        return self._server.info()


class ReplayInMemory:
    """A replay in the memory of a process of its own, with several calls at a time.

    Args:
        arguments: of `MemoryServer`: its table, and where its checkpoints lie.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.server = MemoryServer(**arguments)

    def start(self) -> list[str]:
        """Sentences about checkpoints that were passed over, once it serves."""
        return self.server.messages

    def checkpoint(self) -> Path:
        return self.server.checkpoint()

    def info(self) -> ReplayInfo:
        return self.server.info()

    # What `deploy.replay_link.RayLink` asks for.

    def open(self, streams: Sequence[int]) -> int:
        return self.server.table.open(streams)

    def append(self, life: int, block: Block) -> Appended:
        return self.server.table.append(life, block)

    def settle(self, life: int, streams: Sequence[int], at_most: int, timeout: float) -> list[int]:
        return self.server.table.settle(life, streams, at_most, timeout)

    def draw(self, batch_size: int, at_most: int, timeout: float) -> tuple[int, Columns]:
        return self.server.table.draw(batch_size, at_most, timeout)

    def close(self) -> None:
        self.server.stop()


class Metrics(MetricsWriter):
    """A cluster's processes do not inherit the driver's environment, and what Ray is told, it shows."""

    def __init__(self, environ: dict[str, str], *rest: Any):
        os.environ.update(environ)
        super().__init__(*rest)
