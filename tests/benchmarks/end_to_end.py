"""The whole program: nano OSRP-Vector on PointGoal1 under Ray, and what every process of it uses."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from common.metrics import METRICS
from tests.benchmarks.measure import Row
from tests.benchmarks.processes import Snapshot, watch

ENV_STEPS = 30_000
ACTORS = (1, 2, 4)
_STEADY = ENV_STEPS / 3  # from then on everything is compiled and replay is filled
_POLL_SECONDS = 1.0
_TIMEOUT_SECONDS = 900


def run() -> Iterator[Row]:
    """Rates and what every part uses, for every number of actors."""
    for actors in ACTORS:
        yield from _run(actors)


def _run(actors: int) -> Iterator[Row]:
    peaks: dict[int, tuple[str, float]] = {}  # process id -> part, MB
    steady: list[Snapshot] = []
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        for snapshot in watch(_command(run, actors), _POLL_SECONDS):
            if snapshot.seconds > _TIMEOUT_SECONDS:
                raise RuntimeError(f"{actors} actors were not done after {_TIMEOUT_SECONDS} s")
            for process, use in snapshot.uses.items():
                peaks[process] = use.part, max(use.memory, peaks.get(process, (use.part, 0.0))[1])
            rows = _rows(run)
            if rows and rows[-1]["env_steps"] < ENV_STEPS:
                steady.append(snapshot)
        rows = _rows(run)
    name = f"{actors} actor{'s' * (actors > 1)}"
    for what, metric, unit, scale in (
        ("env steps", "time/env_steps_per_second", "1/s", 1),
        ("updates", "time/updates_per_second", "1/s", 1),
        ("learner waits", "time/learner_waiting", "%", 100),
        ("actors wait", "time/actors_waiting", "%", 100),
    ):
        values = [row[metric] for row in rows if metric in row]
        yield Row("end to end", f"{name}: {what}", scale * mean(values), unit)
    cores = _cores(steady)
    memory = dict[str, float]()
    for part, peak in peaks.values():
        memory[part] = memory.get(part, 0.0) + peak
    for part, peak in sorted(memory.items(), key=lambda use: -use[1]):
        used = cores.get(part, [])
        idle = ", ".join(f"{100 * (1 - share):.0f} %" for share in used) if part != "Ray" else ""
        note = f"{sum(used):.2f} cores" + (f"; idle: {idle}" if idle else "")
        yield Row("end to end", f"{name}: {part} peak memory", peak, "MB", note=note)
    yield Row("end to end", f"{name}: all processes", sum(map(sum, cores.values())), "cores")


def _rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics in the steady part of a run; none before."""
    path = run / METRICS
    if not path.is_file():
        return []
    lines = path.read_text().rpartition("\n")[0].splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["env_steps"] > _STEADY and "time/learner_waiting" in row]


def _cores(snapshots: list[Snapshot]) -> dict[str, list[float]]:
    """CPU-seconds per second of every process that lives through all snapshots, by part."""
    first, last = snapshots[0], snapshots[-1]
    cores: dict[str, list[float]] = {}
    for process in first.uses.keys() & last.uses.keys():
        used = last.uses[process].cpu - first.uses[process].cpu
        cores.setdefault(last.uses[process].part, []).append(used / (last.seconds - first.seconds))
    return cores


def _command(run: Path, actors: int) -> list[str]:
    flags: dict[str, Any] = {
        "method": "osrp_vector",
        "size": "nano",
        "task": "SafetyPointGoal1-v0",
        "run-dir": run,
        "env-steps": ENV_STEPS,
        "actors.count": actors,
        "evaluation.every": 0,
        "evaluation.final-episodes": 1,
    }
    program = str(Path(sys.executable).parent / "safedreamer")
    return [program, "train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
