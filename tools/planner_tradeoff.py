"""What a trained agent's planner gains from more iterations, and what it costs: return, cost, time.

    .venv/bin/python tools/planner_tradeoff.py RUN [--episodes N] [--out FILE]

Plays the evaluation protocol's episodes with other planner settings than the run's own. The time is CPU
time per decision for one environment; iterations are the mean over decisions.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from actors.evaluate import evaluate
from common.config import Config
from common.configuration import merge
from common.metrics import summarize_episodes
from common.types import Params
from deploy import wiring
from deploy.evaluate import load

TOLERANCES = (0.0, 0.02, 0.05, 0.1, 0.2)
VARIANTS: list[dict[str, Any]] = [
    {},
    *({"iterations": 6, "tolerance": tolerance} for tolerance in TOLERANCES),
]


@dataclass
class Watched:
    """A compiled `Policy.act` that adds up its own CPU time and iterations."""

    act: Callable
    seconds: list[float] = field(default_factory=list)
    iterations: list[float] = field(default_factory=list)

    def __call__(self, *args: Any) -> Any:
        started = time.process_time()
        result = jax.block_until_ready(self.act(*args))
        self.seconds.append(time.process_time() - started)
        self.iterations.append(float(result[2]["plan/iterations"]))
        return result


def play(cfg: Config, params: Params, episodes: int) -> tuple[Watched, dict[str, float]]:
    """The protocol's first episodes, all at once."""
    policy = wiring.policy(cfg, wiring.spec_of(cfg), explore=False)
    watched = Watched(jax.jit(policy.act))
    env = wiring.evaluation_env(cfg, cfg.evaluation.seed, episodes)
    results = evaluate(env, policy, params, seed=cfg.evaluation.seed, act=watched)
    env.close()
    assert results is not None  # nothing stops it
    return watched, summarize_episodes(results)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = load(args.run)
    table = Table("samples", "iterations", "tolerance", "used", "ms", "return", "cost")
    rows = []
    for changes in VARIANTS:
        cfg = merge(loaded.cfg, {"planner": changes}, "variant")
        one, _ = play(cfg, loaded.params, 1)
        many, summary = play(cfg, loaded.params, args.episodes)
        row = {
            "samples": cfg.planner.samples,
            "iterations": cfg.planner.iterations,
            "tolerance": cfg.planner.tolerance,
            "used": float(np.mean(many.iterations)),
            "milliseconds": 1e3 * float(np.mean(one.seconds[1:])),
            **summary,
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        table.add_row(
            *(f"{row[name]:g}" for name in ("samples", "iterations", "tolerance")),
            f"{row['used']:.2f}",
            f"{row['milliseconds']:.1f}",
            f"{row['eval/return']:.1f} ± {row['eval/return_std']:.1f}",
            f"{row['eval/cost']:.1f} ± {row['eval/cost_std']:.1f}",
        )
    Console(width=120).print(table)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
