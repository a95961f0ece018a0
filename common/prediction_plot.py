"""Open-loop prediction against the truth as a PNG: some sequences in detail, the errors of all.

Colours are those of `common.plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.plots import EVAL, LIMIT, REFERENCE, RUN_COLORS, save

_TRUE, _PREDICTED = LIMIT, EVAL
_BAND = (10, 90)  # percentiles of an error over the sequences


@dataclass(frozen=True)
class Signal:
    """One quantity along N sequences of T steps, as it was and as it was predicted."""

    unit: str
    true: np.ndarray  # [N, T]
    predicted: np.ndarray  # [N, T]
    source: str = ""  # what predicts it, where methods differ


@dataclass(frozen=True)
class Sequences:
    """Predictions of N sequences: `context` filtered steps, then imagined ones, T in all."""

    title: str
    context: int
    step_unit: str  # "agent steps (5 env steps each)"
    names: Sequence[str]  # where each sequence starts, N
    shown: Sequence[int]  # sequences to draw in detail
    horizon: int  # imagined steps that behaviour is trained on
    signals: Mapping[str, Signal]  # "reward", "cost"
    hazards: Mapping[str, np.ndarray] = field(default_factory=dict)  # source -> errors (m) [N, T]
    hazard_radius: float | None = None  # m

    @property
    def steps(self) -> np.ndarray:
        """Imagined steps [T]: 0 is the last filtered one."""
        length = next(iter(self.signals.values())).true.shape[1]
        return np.arange(length) - self.context + 1


def plot_prediction(sequences: Sequences, out_png: Path) -> Path:
    """Draws, from above: each signal along the sequences shown, then the errors over all sequences.

    Raises UserError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(sequences.signals), len(sequences.shown)
    figure = Figure(figsize=(max(10.0, 3.0 * columns), 2.3 * rows + 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(sequences.title, fontsize=12)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.3 * rows, 3.2))
    above, below = parts
    axes = above.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    _draw_sequences(axes, sequences)
    above.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    below.suptitle(
        f"error over all {len(sequences.names)} sequences: mean, band from the {_BAND[0]}th to the "
        f"{_BAND[1]}th percentile",
        fontsize=10,
    )
    errors = list(sequences.signals.items())
    axes = below.subplots(1, len(errors) + bool(sequences.hazards), squeeze=False)[0]
    for axis, (name, signal) in zip(axes, errors, strict=False):
        _draw_error(axis, sequences, np.abs(signal.predicted - signal.true), _PREDICTED, "")
        axis.set_ylabel(f"error of {name}\n({signal.unit})")
    if sequences.hazards:
        _draw_hazards(axes[-1], sequences)
    for axis in axes:
        axis.set_xlabel(f"imagined {sequences.step_unit}")
        axis.set_ylim(bottom=0)
    return save(figure, out_png)


def _draw_sequences(axes: np.ndarray, sequences: Sequences) -> None:
    steps = sequences.steps
    for line, (name, signal) in zip(axes, sequences.signals.items(), strict=True):
        for axis, index in zip(line, sequences.shown, strict=True):
            _prepare(axis, sequences)
            axis.plot(steps, signal.true[index], color=_TRUE, linewidth=1.6, label="true")
            axis.plot(steps, signal.predicted[index], color=_PREDICTED, linewidth=1.6, label="predicted")
        source = f"\npredicted from\n{signal.source}" if signal.source else ""
        line[0].set_ylabel(f"{name}\n({signal.unit}){source}")
    for axis, index in zip(axes[0], sequences.shown, strict=True):
        axis.set_title(sequences.names[index], fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("imagined agent steps")


def _draw_hazards(axis: Any, sequences: Sequences) -> None:
    named = []
    for (source, error), color in zip(sequences.hazards.items(), RUN_COLORS[1:], strict=False):
        _draw_error(axis, sequences, error, color, source)
        named.append(source)
    if sequences.hazard_radius is not None:
        label = f"hazard radius ({sequences.hazard_radius:g} m)"
        axis.axhline(sequences.hazard_radius, color=REFERENCE, linestyle="--", linewidth=1.2, label=label)
        named.append(label)
    axis.set_ylabel("error of the nearest\nhazard's position (m)")
    axis.legend(
        handles=[line for line in axis.lines if line.get_label() in named], fontsize=8, loc="upper left"
    )


def _draw_error(axis: Any, sequences: Sequences, error: np.ndarray, color: str, label: str) -> None:
    steps = sequences.steps
    if not axis.lines:
        _prepare(axis, sequences)
    low, high = np.percentile(error, _BAND, axis=0)
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(steps, error.mean(0), color=color, linewidth=1.8, label=label or None)


def _prepare(axis: Any, sequences: Sequences) -> None:
    """Grid, grey where the model still sees what happens, and how far imagination goes in training."""
    steps = sequences.steps
    axis.axvspan(steps[0], 0, color="#999999", alpha=0.18, linewidth=0, label="the model still sees")
    axis.axvline(0, color="#777777", linewidth=1)
    if sequences.horizon < steps[-1]:
        label = f"horizon in training ({sequences.horizon})"
        axis.axvline(sequences.horizon, color="#777777", linewidth=1, linestyle=":", label=label)
    axis.set_xlim(steps[0], steps[-1])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
