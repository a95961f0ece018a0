"""Curves of one or several runs as a PNG: return and cost over env steps.

Training episodes stand behind (faint points, running mean), evaluations in front with their
standard deviation; several runs become their mean with a band from the lowest to the highest.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from common.metrics import EPISODES, METRICS
from common.sinks import read_jsonl
from common.types import UserError
from common.yaml_file import read_yaml

TRAIN, EVAL, REFERENCE, LIMIT = "#0072B2", "#D55E00", "#555555", "#000000"
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTHING = 20  # training episodes in a running mean
GRID_POINTS = 200  # env steps at which several runs are compared
QUANTITIES = (("return", "return per episode"), ("cost", "cost per episode"))


@dataclass(frozen=True)
class Curve:
    """Values over env steps, both [n] and sorted by env steps; `spread` is a standard deviation."""

    env_steps: np.ndarray
    values: np.ndarray
    spread: np.ndarray


def plot_run(run_dir: Path, out_png: Path) -> Path:
    """Draws return and cost of one run; a run without data gives an empty plot that says so."""
    run_dir = Path(run_dir)
    figure, axes = _figure(f"{run_dir.name}")
    episodes, evaluations = read_jsonl(run_dir / EPISODES), read_jsonl(run_dir / METRICS)
    limit = _cost_limit(run_dir)
    for axis, (name, _) in zip(axes, QUANTITIES, strict=True):
        train, evaluation = _curve(episodes, name), _curve(evaluations, f"eval/{name}")
        if not train.env_steps.size and not evaluation.env_steps.size:
            _say_empty(axis)
            continue
        _draw_training(axis, train)
        _draw_evaluations(axis, evaluation)
        if evaluation.env_steps.size and evaluation.env_steps[0] == 0:
            label = f"untrained policy ({evaluation.values[0]:.1f})"
            axis.axhline(evaluation.values[0], color=REFERENCE, linestyle=":", linewidth=1.5, label=label)
        if name == "cost":
            _draw_limit(axis, limit)
        axis.legend(loc="best", fontsize=8, framealpha=0.8)
    return save(figure, Path(out_png))


def plot_runs(
    run_dirs: Sequence[Path],
    out_png: Path,
    labels: Sequence[str] | None = None,
    aggregate: bool = False,
    references: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Draws the evaluations of several runs (where a run has none, its smoothed training episodes).

    One line per run, named by `labels` or its directory; or, with `aggregate`, one line per
    distinct label (all runs together without labels): the mean over its runs and their range.

    Args:
        references: what others reached, by name: (return, cost), drawn as horizontal lines.
    """
    run_dirs = [Path(run_dir) for run_dir in run_dirs]
    if labels is not None and len(labels) != len(run_dirs):
        raise ValueError(f"{len(labels)} labels for {len(run_dirs)} runs")
    default = [f"mean of {len(run_dirs)} runs"] * len(run_dirs) if aggregate else [d.name for d in run_dirs]
    names = list(labels) if labels is not None else default
    groups: dict[Any, list[Path]] = {}
    for index, (name, run_dir) in enumerate(zip(names, run_dirs, strict=True)):
        groups.setdefault((name,) if aggregate else (name, index), []).append(run_dir)
    figure, axes = _figure("")
    for axis, (quantity, _) in zip(axes, QUANTITIES, strict=True):
        for index, (key, members) in enumerate(groups.items()):
            curves = [curve for curve in (_best_curve(d, quantity) for d in members) if curve.env_steps.size]
            if curves:
                _draw_group(axis, curves, key[0], RUN_COLORS[index % len(RUN_COLORS)], marker=index)
        if not axis.lines:
            _say_empty(axis)
            continue
        for index, (name, reached) in enumerate((references or {}).items()):
            value = reached[0] if quantity == "return" else reached[1]
            style = (":", "-.", (0, (1, 3)))[index % 3]
            axis.axhline(value, color=REFERENCE, linestyle=style, linewidth=1.2, label=f"{name} ({value:g})")
        limits = {_cost_limit(run_dir) for run_dir in run_dirs}
        if quantity == "cost" and len(limits) == 1:
            _draw_limit(axis, limits.pop())
        axis.legend(loc="best", fontsize=8, framealpha=0.8)
    return save(figure, Path(out_png))


def _curve(rows: Sequence[dict[str, Any]], name: str) -> Curve:
    """All rows that hold a value under `name`, with its `_std` where there is one."""
    found = []
    for row in rows:
        value, spread = row.get(name), row.get(f"{name}_std")
        if _is_number(value):
            spread = spread if _is_number(spread) and spread >= 0 else 0.0
            found.append((row["env_steps"], value, spread))
    columns = np.array(sorted(found, key=lambda entry: entry[0]), dtype=np.float64).reshape(-1, 3)
    return Curve(columns[:, 0], columns[:, 1], columns[:, 2])


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a row can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e30


def _best_curve(run_dir: Path, name: str) -> Curve:
    evaluation = _curve(read_jsonl(run_dir / METRICS), f"eval/{name}")
    return evaluation if evaluation.env_steps.size else _smooth(_curve(read_jsonl(run_dir / EPISODES), name))


def _smooth(curve: Curve) -> Curve:
    """Mean over the newest episodes up to each point, fewer at the start."""
    totals = np.concatenate([[0.0], np.cumsum(curve.values)])
    ends = np.arange(1, len(totals))
    starts = np.maximum(0, ends - SMOOTHING)
    return Curve(curve.env_steps, (totals[ends] - totals[starts]) / (ends - starts), curve.spread)


def _cost_limit(run_dir: Path) -> float | None:
    """The limit on the cost of an episode, where the run's constraint is about whole episodes."""
    try:
        config = read_yaml(run_dir / "config.yaml")
        if config["safety"]["constraint"] != "pid" and config["policy"] != "planner":
            return None
        return float(config["safety"]["cost_limit"])
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None  # a plot without the line is better than none


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    # Without pyplot: no global state, no window, and it works in any thread.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10)
    for axis, (_, label) in zip(axes, QUANTITIES, strict=True):
        axis.set_xlabel("env steps")
        axis.set_ylabel(label)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_training(axis: Any, train: Curve) -> None:
    if not train.env_steps.size:
        return
    axis.plot(train.env_steps, train.values, ".", color=TRAIN, alpha=0.35, markersize=4, markeredgewidth=0)
    smooth = _smooth(train)
    label = f"training (mean of {SMOOTHING} episodes)"
    axis.plot(smooth.env_steps, smooth.values, color=TRAIN, alpha=0.8, linewidth=1.5, label=label)


def _draw_evaluations(axis: Any, evaluation: Curve) -> None:
    if not evaluation.env_steps.size:
        return
    style = {"color": EVAL, "marker": "o", "markersize": 5, "linewidth": 1.2, "capsize": 3}
    label = "evaluation (mean ± std)"
    axis.errorbar(evaluation.env_steps, evaluation.values, evaluation.spread, label=label, zorder=3, **style)


def _draw_group(axis: Any, curves: Sequence[Curve], label: str, color: str, marker: int) -> None:
    """One run as its points; several as mean and range over the env steps that all of them reached."""
    start = max(curve.env_steps[0] for curve in curves)
    stop = min(curve.env_steps[-1] for curve in curves)
    if len(curves) == 1 or stop < start:
        for curve in curves:
            axis.plot(curve.env_steps, curve.values, marker="osv^Dx+"[marker % 7], color=color, label=label)
        return
    grid = np.linspace(start, stop, GRID_POINTS)
    values = np.stack([np.interp(grid, curve.env_steps, curve.values) for curve in curves])
    axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    style = ("-", "--", "-.", ":")[marker % 4]
    axis.plot(grid, values.mean(axis=0), style, color=color, linewidth=2, label=label)


def _draw_limit(axis: Any, limit: float | None) -> None:
    if limit is not None:
        axis.axhline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"cost limit ({limit:g})")


def _say_empty(axis: Any) -> None:
    axis.text(
        0.5, 0.5, "no episodes yet", ha="center", va="center", transform=axis.transAxes, color="#777777"
    )
    axis.set_xticks([])
    axis.set_yticks([])


def save(figure: Any, out_png: Path) -> Path:
    """Writes a figure, with the directory it belongs to."""
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=110)
    return out_png
