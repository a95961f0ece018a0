"""The whole program: nano OSRP-Vector on PointGoal1 under Ray, and what every process of it uses."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import psutil

from common.metrics import METRICS
from tests.benchmarks.measure import Row

ENV_STEPS = 30_000
ACTORS = (1, 2, 4)
_POLL_SECONDS = 1.0
_TIMEOUT_SECONDS = 900
# What Ray calls the processes of the parts; everything else is Ray itself.
_PARTS = {"_Actor": "actor", "_Learner": "learner", "_Replay": "replay", "_Evaluator": "evaluator"}


class Use(NamedTuple):
    """What one process used."""

    part: str
    cpu: float  # seconds
    peak: float  # MB of resident memory
    memory: list[tuple[float, float]]  # (seconds, MB)


def run() -> Iterator[Row]:
    """Rates and shares for every number of actors; the rest for the first."""
    for actors in ACTORS:
        yield from _run(actors, detailed=actors == ACTORS[0])


def _run(actors: int, detailed: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        uses, cpu, wall = _watch(_command(run, actors))
        rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    # Between two thirds and the end, when everything is compiled and replay is filled.
    rows = [row for row in rows if row["env_steps"] > ENV_STEPS / 3 and "time/learner_waiting" in row]
    name = f"{actors} actor{'s' * (actors > 1)}"

    def average(metric: str) -> float:
        return mean(row[metric] for row in rows if metric in row)

    yield Row(
        "end to end",
        f"{name}: env steps",
        average("time/env_steps_per_second"),
        "1/s",
        note=f"{wall:.0f} s in all",
    )
    yield Row("end to end", f"{name}: updates", average("time/updates_per_second"), "1/s")
    yield Row("end to end", f"{name}: learner waits", 100 * average("time/learner_waiting"), "%")
    yield Row("end to end", f"{name}: actors wait", 100 * average("time/actors_waiting"), "%")
    if detailed:
        for use in sorted(uses, key=lambda use: -use.cpu)[:8]:
            note = (
                f"{use.cpu:.1f} s of CPU in {wall:.0f} s, {100 * (1 - use.cpu / wall):.0f} % idle of one core"
            )
            yield Row("end to end", f"{use.part}: peak memory", use.peak, "MB", note=note)
        yield Row("end to end", "all processes: CPU", cpu, "s", note=f"{cpu / wall:.2f} cores")


def _growth(use: Use) -> float:
    """MB of memory at the end more than half-way."""
    half = (use.memory[0][0] + use.memory[-1][0]) / 2
    return use.memory[-1][1] - next(memory for seconds, memory in use.memory if seconds >= half)


def _command(run: Path, actors: int) -> list[str]:
    flags: dict[str, Any] = {
        "method": "osrp_vector",
        "size": "nano",
        "task": "SafetyPointGoal1-v0",
        "run-dir": run,
        "env-steps": ENV_STEPS,
        "actors.count": actors,
        "evaluation.every": 0,
        "evaluation.final-episodes": 0,
    }
    program = str(Path(sys.executable).parent / "safedreamer")
    return [program, "train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def _watch(command: list[str]) -> tuple[list[Use], float, float]:
    """(What each process used, CPU-seconds of all, wall seconds) of a command. RuntimeError if it fails."""
    started = time.monotonic()
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: dict[int, Use] = {}
    try:
        while program.poll() is None:
            if time.monotonic() - started > _TIMEOUT_SECONDS:
                raise RuntimeError(f"not done after {_TIMEOUT_SECONDS} s: {' '.join(command)}")
            _look(program.pid, time.monotonic() - started, found)
            time.sleep(_POLL_SECONDS)
    finally:
        if program.poll() is None:
            program.terminate()
        output, _ = program.communicate(timeout=60)
    if program.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    return list(found.values()), sum(use.cpu for use in found.values()), time.monotonic() - started


def _look(root: int, now: float, found: dict[int, Use]) -> None:
    """Brings `found`, by process id, up to date with the process `root` and all below it."""
    try:
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            times, memory = process.cpu_times(), process.memory_info().rss / 1e6
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        part = next((part for key, part in _PARTS.items() if f"::{key}" in title), None)
        part = part or ("driver" if process.pid == root else process.name())
        before = found.get(process.pid, Use(part, 0.0, 0.0, []))
        use = Use(part, times.user + times.system, max(before.peak, memory), [*before.memory, (now, memory)])
        found[process.pid] = use
