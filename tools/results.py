"""Collects finished runs into one JSON file for docs/results: configuration, curve, last evaluation.

python tools/results.py OUT.json RUN [RUN ...]
"""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List


def rows_of(path: Path) -> List[Dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collect(run: Path) -> Dict[str, Any]:
    """One run: how it was configured, every evaluation, and how it ended."""
    rows = rows_of(run / "metrics.jsonl")
    episodes = rows_of(run / "episodes.jsonl")
    evaluations = [row for row in rows if "eval/return" in row]
    last = next(row for row in reversed(rows) if "replay/train_ratio" in row)
    return {
        "config": (run / "config.yaml").read_text(encoding="utf-8"),
        "train_ratio": last["replay/train_ratio"],
        "updates": last["train/updates"],
        "wall_seconds": rows[-1]["wall_seconds"],
        "training_cost_per_episode": sum(row["cost"] for row in episodes) / max(1, len(episodes)),
        "evaluations": evaluations,
    }


def main() -> None:
    """Entry point."""
    out, *runs = map(Path, sys.argv[1:])
    if not runs:
        sys.exit("usage: python tools/results.py OUT.json RUN [RUN ...]")
    out.write_text(json.dumps([collect(run) for run in runs], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
