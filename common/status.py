"""The state of a run as a user sees it, and its drawing in whatever room the terminal has."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import fmean

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.types import EpisodeResult

RECENT = 20  # training episodes that the view averages over
BLOCKS = "▁▂▃▄▅▆▇█"
WIDE = 84  # columns from which on two things stand side by side


@dataclass(frozen=True)
class Evaluation:
    """Mean and standard deviation over the episodes of one evaluation."""

    env_steps: int
    return_: float
    return_std: float
    cost: float
    cost_std: float


@dataclass
class Status:
    """Everything the view shows. None means: not known yet, not shown."""

    method: str
    task: str
    size: str
    seed: int
    run_dir: Path
    env_steps_total: int
    phase: str = "starting"  # e.g. compiling, prefill, training, evaluating
    env_steps: int = 0
    env_steps_per_second: float = 0.0
    updates: int = 0
    updates_per_second: float = 0.0
    train_ratio: float | None = None  # realised: replayed per collected agent step
    train_ratio_target: float | None = None
    actors_waiting: float | None = None  # share of their time, for the learner (rate limiter)
    learner_waiting: float | None = None  # share of its time, for batches
    version: int | None = None  # newest published parameters
    staleness: float | None = None  # mean versions that the acting parameters are behind it
    multiplier: float | None = None
    episodes: deque[EpisodeResult] = field(default_factory=lambda: deque(maxlen=400))
    evaluations: deque[Evaluation] = field(default_factory=lambda: deque(maxlen=50))
    down: dict[str, float] = field(default_factory=dict)  # parts that do not work, and seconds since when
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=3))  # restarts and the like


def status_line(status: Status) -> str:
    """One plain line: how far, how fast, how good, how safe."""
    done = 100 * status.env_steps / max(1, status.env_steps_total)
    parts = [
        f"{status.phase}: {status.env_steps:,}/{status.env_steps_total:,} env steps ({done:.0f} %)",
        f"{status.env_steps_per_second:,.0f} env steps/s",
        f"{status.updates:,} updates ({status.updates_per_second:.1f}/s)",
    ]
    if status.train_ratio is not None:
        parts.append(f"train ratio {_ratio(status)}")
    recent = list(status.episodes)[-RECENT:]
    if recent:
        parts.append(
            f"return {fmean(e.return_ for e in recent):.1f}, cost {fmean(e.cost for e in recent):.1f}"
        )
    if status.multiplier is not None:
        parts.append(f"multiplier {status.multiplier:.3g}")
    evaluations = list(status.evaluations)
    if evaluations:
        last = evaluations[-1]
        parts.append(f"evaluation at {last.env_steps:,}: return {last.return_:.1f}, cost {last.cost:.1f}")
    if status.down:
        parts.append(_down(status))
    return " | ".join(parts)


class StatusView:
    """Draws a `Status` within the width and height there are; what matters least is left out first."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        s, inner = self.status, options.update_width(max(20, options.max_width - 4))
        room = console.size.height - 3  # the frame and the cursor's line
        shown = []
        blocks = _blocks(s, wide=inner.max_width >= WIDE)
        for index, (priority, block) in sorted(enumerate(blocks), key=lambda item: item[1][0]):
            height = len(console.render_lines(block, inner, pad=False))
            if height <= room or priority == 0:
                room -= height
                shown.append((index, block))
        title = Text(f" {s.method} · {s.task} · {s.size} · seed {s.seed} ", style="bold", overflow="ellipsis")
        run_dir = Text(f" {s.run_dir} ", style="dim", overflow="ellipsis")
        body = Group(*(block for _, block in sorted(shown, key=lambda item: item[0])))
        yield Panel(body, title=title, subtitle=run_dir, title_align="left", subtitle_align="left")


def _blocks(s: Status, wide: bool) -> list[tuple[int, RenderableType]]:
    """(priority, block) from top to bottom; 0 is the most important."""
    episodes, evaluations = _episodes(s), _evaluations(s, rows=4)
    facts = _facts(s, columns=2 if wide else 1)
    blocks: list[tuple[int, RenderableType]] = [(0, _progress(s)), (3, facts)]
    if wide:
        grid = Table.grid(expand=True, padding=(0, 2))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(episodes, evaluations)
        blocks += [(5, Text()), (1, grid)]
    else:
        blocks += [(1, episodes), (4, evaluations)]
    if s.down:
        blocks.append((1, Text(_down(s), style="bold red")))
    if s.warnings:
        blocks.append((2, Text("\n".join(f"! {warning}" for warning in list(s.warnings)), style="yellow")))
    return blocks


def _progress(s: Status) -> Group:
    """The bar over env steps, below it the speed and the time that is left at this speed."""
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(no_wrap=True, style="bold")
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    steps = f"{s.env_steps:,} / {s.env_steps_total:,} env steps"
    bar.add_row(s.phase, ProgressBar(max(1, s.env_steps_total), s.env_steps), steps)
    speed = Table.grid(expand=True, padding=(0, 1))
    speed.add_column(no_wrap=True, style="dim", ratio=1, overflow="ellipsis")
    speed.add_column(no_wrap=True, style="dim", justify="right")
    eta = ""
    if s.env_steps_per_second > 0.1:  # slower than that, nothing can be said yet
        seconds = max(0, s.env_steps_total - s.env_steps) / s.env_steps_per_second
        eta = f"{timedelta(seconds=round(seconds))} left"
    speed.add_row(f"{s.env_steps_per_second:,.0f} env steps/s, {s.updates_per_second:,.1f} updates/s", eta)
    return Group(bar, speed)


def _facts(s: Status, columns: int) -> Table:
    facts = [("updates", f"{s.updates:,}")]
    if s.train_ratio is not None:
        facts.append(("train ratio", _ratio(s)))
    if s.actors_waiting is not None:
        facts.append(("actors", f"waiting for the learner {100 * s.actors_waiting:.0f} %"))
    if s.learner_waiting is not None:
        facts.append(("learner", f"waiting for the actors {100 * s.learner_waiting:.0f} %"))
    if s.version is not None:
        behind = "" if s.staleness is None else f", actors {s.staleness:.1f} behind"
        facts.append(("parameters", f"version {s.version:,}{behind}"))
    if s.multiplier is not None:
        facts.append(("multiplier", f"{s.multiplier:.4g}"))
    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in range(columns):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for start in range(0, len(facts), columns):
        grid.add_row(*(cell for fact in facts[start : start + columns] for cell in fact))
    return grid


def _down(status: Status) -> str:
    return "down: " + ", ".join(f"{name} for {seconds:.0f} s" for name, seconds in status.down.items())


def _ratio(status: Status) -> str:
    target = f" of {status.train_ratio_target:,.4g}" if status.train_ratio_target is not None else ""
    return f"{status.train_ratio:,.4g}{target}" if status.train_ratio is not None else f"-{target}"


def _episodes(s: Status) -> Table:
    """Means of the newest training episodes, and how they got there."""
    episodes = list(s.episodes)
    recent = episodes[-RECENT:]
    title = f"training, last {len(recent)} episodes" if recent else "training: no episode has ended yet"
    table = _table(title, show_header=bool(recent))
    table.add_column("", style="dim")
    table.add_column("mean", justify="right")
    table.add_column("history", ratio=1, no_wrap=True)
    if recent:
        length = sum(e.length for e in recent)
        returns, costs = [e.return_ for e in episodes], [e.cost for e in episodes]
        table.add_row("return", f"{fmean(returns[-RECENT:]):.2f}", Text(sparkline(returns), style="green"))
        table.add_row("cost", f"{fmean(costs[-RECENT:]):.2f}", Text(sparkline(costs), style="red"))
        table.add_row("cost rate", f"{sum(costs[-RECENT:]) / length:.4f}", Text("per env step", style="dim"))
    return table


def _evaluations(s: Status, rows: int) -> Table:
    evaluations = list(s.evaluations)[-rows:]
    table = _table("evaluation" if evaluations else "evaluation: none yet", show_header=bool(evaluations))
    table.add_column("env steps", justify="right")
    table.add_column("return", justify="right")
    table.add_column("cost", justify="right")
    for e in reversed(evaluations):
        row = (
            f"{e.env_steps:,}",
            f"{e.return_:.2f} ± {e.return_std:.2f}",
            f"{e.cost:.2f} ± {e.cost_std:.2f}",
        )
        table.add_row(*row)
    return table


def _table(title: str, show_header: bool) -> Table:
    heading = Text(title, style="bold")
    table = Table(title=heading, title_justify="left", box=None, expand=True, pad_edge=False)
    table.show_header = show_header
    return table


def sparkline(values: list[float], width: int = 20) -> str:
    """Means of `width` equal stretches of `values` as block characters between their extremes."""
    values = [value for value in values if isfinite(value)]
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)] if width else [0]
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    scale = (len(BLOCKS) - 1) / span if span > 0 else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
