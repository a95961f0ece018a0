"""Memory of every part over a run of the default agent: a curve and a JSON file.

python -m tests.benchmarks.memory [--minutes 30] [--out docs/results/memory]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from common.metrics import METRICS
from tests.benchmarks.processes import Snapshot, watch

EVERY_SECONDS = 5.0
_ENDLESS = 10_000_000  # env steps


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/memory"), help="without suffix (%(default)s)"
    )
    args = parser.parse_args()
    snapshots: list[Snapshot] = []
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        program = str(Path(sys.executable).parent / "safedreamer")
        command = [program, "train", "--run-dir", str(run), "--env-steps", str(_ENDLESS)]
        for snapshot in watch(command, EVERY_SECONDS):
            snapshots.append(snapshot)
            if snapshot.seconds > 60 * args.minutes:
                break
        rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    seconds = [round(snapshot.seconds, 1) for snapshot in snapshots]
    parts = _by_part(snapshots)
    growth = {part: round(_growth(seconds, memory), 2) for part, memory in parts.items()}
    result = {
        "env_steps": rows[-1]["env_steps"],
        "peak_mb": {part: max(memory) for part, memory in parts.items()},
        "growth_mb_per_minute": growth,
        "seconds": seconds,
        "mb": parts,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result) + "\n")
    _draw(seconds, parts, args.out.with_suffix(".png"))
    for part, memory in parts.items():
        print(f"{part}: peak {max(memory)} MB, {growth[part]:+.2f} MB a minute in the second half")


def _by_part(snapshots: Sequence[Snapshot]) -> dict[str, list[int]]:
    """MB of each part at each snapshot, summed over its processes; the largest first."""
    sums = [dict[str, float]() for _ in snapshots]
    for memory, snapshot in zip(sums, snapshots, strict=True):
        for use in snapshot.uses.values():
            memory[use.part] = memory.get(use.part, 0.0) + use.memory
    names = {part for memory in sums for part in memory}
    curves = {part: [round(memory.get(part, 0.0)) for memory in sums] for part in names}
    return dict(sorted(curves.items(), key=lambda curve: -median(curve[1])))


def _growth(seconds: Sequence[float], memory: Sequence[float]) -> float:
    """MB a minute: the slope of a line through the second half."""
    half = len(seconds) // 2
    return 60 * float(np.polyfit(seconds[half:], memory[half:], 1)[0])


def _draw(seconds: Sequence[float], parts: dict[str, list[int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    minutes = [s / 60 for s in seconds]
    for part, memory in parts.items():
        axes.plot(minutes, memory, label=f"{part} ({memory[-1]} MB)")
    axes.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None), xlim=(0, minutes[-1]))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
