"""What every process of a command uses, looked at from outside."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import psutil

# What Ray calls the processes of the parts; all others below the driver are Ray's own.
_PARTS = {
    "_Actor": "actor",
    "_Learner": "learner",
    "Replay": "replay",
    "_Evaluator": "evaluator",
    "_Inference": "inference",
    "Holder": "weights",
    "Metrics": "metrics",
}
_END_SECONDS = 120.0  # for a last checkpoint


class Use(NamedTuple):
    """What one process used up to now."""

    part: str
    cpu: float  # seconds
    memory: float  # MB resident


class Snapshot(NamedTuple):
    """All processes at one time."""

    seconds: float  # since the start
    uses: dict[int, Use]  # by process id


def watch(command: Sequence[str], every: float) -> Iterator[Snapshot]:
    """Runs `command` and yields a snapshot `every` seconds until it ends.

    Whoever stops iterating earlier ends it with SIGTERM. Raises RuntimeError, with its output, if it fails.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        program = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            while program.poll() is None:
                yield Snapshot(time.monotonic() - started, _look(program.pid))
                time.sleep(every)
        finally:
            if program.poll() is None:
                program.terminate()
            program.wait(_END_SECONDS)
        if program.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read()}")


def _look(root: int) -> dict[int, Use]:
    uses: dict[int, Use] = {}
    try:
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return uses
    for process in processes:
        try:
            title, times, memory = " ".join(process.cmdline()), process.cpu_times(), process.memory_info()
        except psutil.NoSuchProcess:
            continue
        part = next((part for name, part in _PARTS.items() if title.startswith(f"ray::{name}")), "Ray")
        part = "driver" if process.pid == root else part
        uses[process.pid] = Use(part, times.user + times.system, memory.rss / 1e6)
    return uses
