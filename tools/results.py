"""Evidence for docs/results: finished runs as one JSON file and one figure.

    .venv/bin/python tools/results.py OUT RUN [RUN ...] [--episodes 20] [--seed 0] [--commit NAME]

OUT.json holds for every run its configuration, commit, curve, wall time, and the episodes of a new evaluation
of its last checkpoint (`--seed 0`: on the layouts of all evaluations in training, other seeds: on others).
OUT.png shows the evaluations of all runs with their range, the cost limit, and what others published.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from statistics import mean
from typing import Any

from actors.evaluate import evaluate
from common import versions
from common.metrics import EPISODES, METRICS
from common.plots import plot_runs
from common.sinks import read_jsonl
from common.yaml_file import read_yaml
from deploy import evaluate as evaluation
from deploy import wiring

# OmniSafe's benchmark of model-based methods, coordinates, 1e6 env steps: (return, cost) per episode.
PUBLISHED = {
    "SafetyPointGoal1-v0": {
        "SafeLOOP": (22.94, 0.04),
        "CCE-PETS": (24.98, 1.87),
        "RCE-PETS": (25.39, 2.46),
    },
    "SafetyCarGoal1-v0": {"SafeLOOP": (22.09, 0.16), "CCE-PETS": (27.60, 1.03), "RCE-PETS": (29.08, 1.02)},
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tools/results.py", description=__doc__)
    parser.add_argument("out", type=Path, help="without suffix")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the layouts (%(default)s)")
    parser.add_argument("--commit", default="", help="that made the runs (default: the present one)")
    args = parser.parse_args()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = args.commit or subprocess.check_output(head, text=True).strip()
    found: list[Any] = [{"commit": commit, **collect(run, args.episodes, args.seed)} for run in args.runs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    config = read_yaml(args.runs[0] / "config.yaml")
    lines = PUBLISHED.get(config["task"], {}) if config["env"]["observation"] == "coordinates" else {}
    plot_runs(args.runs, args.out.with_suffix(".png"), aggregate=True, references=lines)
    for run, result in zip(args.runs, found, strict=True):
        played = result["episodes"]
        line = f"return {mean(played['return']):.2f}, cost {mean(played['cost']):.2f}"
        print(f"{run}: {line}, {sum(cost == 0 for cost in played['cost'])} of {args.episodes} without cost")
    for name in ("return", "cost"):
        print(f"mean {name}: {mean(mean(result['episodes'][name]) for result in found):.2f}")


def collect(run: Path, episodes: int, seed: int) -> dict[str, Any]:
    """One run: how it was configured, every evaluation, how it ended, and a new evaluation."""
    loaded = evaluation.load(run)
    rows = read_jsonl(run / METRICS)
    trained = read_jsonl(run / EPISODES)
    last = next(row for row in reversed(rows) if "replay/train_ratio" in row)
    return {
        "config": (run / "config.yaml").read_text(encoding="utf-8"),
        "env_steps": rows[-1]["env_steps"],
        "train_ratio": last["replay/train_ratio"],
        "updates": last["train/updates"],
        "wall_seconds": rows[-1]["wall_seconds"],
        "training_cost_per_episode": mean(row["cost"] for row in trained),
        "evaluations": [row for row in rows if "eval/return" in row],
        "layouts": seed,
        "episodes": play(loaded, episodes, seed),
        **versions.of_result(versions.recorded(loaded.meta.get("versions"))),
    }


def play(loaded: evaluation.Loaded, episodes: int, seed: int) -> dict[str, list[float]]:
    """Returns and costs, episode by episode."""
    spec = wiring.spec_of(loaded.cfg)
    env = wiring.evaluation_env(loaded.cfg, seed, episodes)
    results = evaluate(
        env, wiring.policy(loaded.cfg, spec, explore=False), loaded.params, seed=seed, version=0
    )
    env.close()
    return {
        "return": [round(float(result.return_), 2) for result in results],
        "cost": [float(result.cost) for result in results],
    }


if __name__ == "__main__":
    main()
