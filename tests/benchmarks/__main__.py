"""Runs benchmarks, prints a table and writes JSON.

    python -m tests.benchmarks [SUITE ...] [--out FILE]

Close everything else first: the figures are of an idle machine. CPU times count all threads of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common import versions
from tests.benchmarks import acting, end_to_end, environment, inference, learning, sampling
from tests.benchmarks.measure import Row

SUITES: dict[str, Callable[[], Iterator[Row]]] = {
    "environment": environment.run,
    "training": learning.training,
    "planning": learning.planning,
    "acting": acting.run,
    "inference": inference.run,
    "sampling": sampling.run,
    "end-to-end": end_to_end.run,
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON file (%(default)s)")
    args = parser.parse_args()
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"there is no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    rows: list[Row] = []
    started = time.monotonic()
    for name in args.suites or SUITES:
        for row in SUITES[name]():
            rows.append(row)
            print(
                f"{row.suite}: {row.name}: {row.value:.3g} {row.unit}  {row.note}",
                file=sys.stderr,
                flush=True,
            )
    _print(rows)
    machine = {"cpus": len(os.sched_getaffinity(0)), **versions.here()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"machine": machine, "rows": [row._asdict() for row in rows]}, indent=1) + "\n"
    )
    print(f"{time.monotonic() - started:.0f} s; {args.out}")


def _print(rows: list[Row]) -> None:
    table = Table("suite", "what", "value", "unit", "target", "")
    for row in rows:
        table.add_row(row.suite, row.name, f"{row.value:.3g}", row.unit, row.target, row.note)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
