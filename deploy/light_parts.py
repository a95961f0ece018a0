"""The parts of a run under Ray that need no JAX.

Their processes import this module alone, and with it a small part of what actors and learner import: they
start, and start again, that much sooner.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.metrics import MetricsWriter
from deploy import run_dir as runs
from replay.server import ReplayInfo, ReplayServer


class Replay:
    """A replay server in a process of its own; what Reverb says goes to a file, not across the view.

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


class Metrics(MetricsWriter):
    """A cluster's processes do not inherit the driver's environment, and what Ray is told, it shows."""

    def __init__(self, environ: dict[str, str], *rest: Any):
        os.environ.update(environ)
        super().__init__(*rest)
