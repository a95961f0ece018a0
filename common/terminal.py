"""What a user sees in the terminal: the live view of a run, plain lines elsewhere, result tables.

The driver of a run keeps one `Status` up to date; `TerminalView` draws it from a thread of its own.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from common.status import Evaluation as Evaluation
from common.status import Status as Status
from common.status import StatusView, status_line

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.25
OWN_LOGGERS = ("common", "actors", "replay", "learner", "deploy", "safedreamer")


class TerminalView:
    """Shows `status` while it is entered; the caller only changes the status.

    On a terminal (and `live`): a view redrawn about four times a second, with log lines above it.
    Elsewhere: one plain line every `every_seconds`, log lines as plain text, no escape codes.
    """

    def __init__(
        self, status: Status, live: bool = True, every_seconds: float = 5.0, console: Console | None = None
    ) -> None:
        self._status = status
        self._console = console or Console()
        self._live = None
        self._every = every_seconds
        if live and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                StatusView(status), console=self._console, auto_refresh=False, vertical_overflow="crop"
            )
            self._every = REFRESH_SECONDS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._handler = self._make_handler()
        self._replaced: list[logging.Handler] = []

    def __enter__(self) -> Self:
        root = logging.getLogger()
        self._replaced = [handler for handler in root.handlers if _writes_to_terminal(handler)]
        for handler in self._replaced:  # they would write across the view
            root.removeHandler(handler)
        if self._live is not None:
            self._live.start()
        self._draw()  # before anything else can print: Rich places lines above a frame that is there
        root.addHandler(self._handler)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._draw()
        if self._live is not None:
            self._live.stop()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._replaced:
            root.addHandler(handler)

    def _run(self) -> None:
        while not self._stop.wait(self._every) and self._draw():
            pass

    def _draw(self) -> bool:
        """Draws once; a view that fails says so and never ends a run."""
        try:
            if self._live is not None:
                self._live.refresh()
            else:
                line = status_line(self._status)
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        except Exception:
            logger.exception("the terminal view failed")
            return False
        return True

    def _make_handler(self) -> logging.Handler:
        if self._live is not None:
            handler: logging.Handler = RichHandler(
                console=self._console, show_path=False, markup=False, rich_tracebacks=False
            )
        else:
            handler = logging.StreamHandler(self._console.file)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        handler.addFilter(_worth_showing)
        return handler


@dataclass(frozen=True)
class RunResult:
    """What a finished run is judged by; the evaluation is the one at its end."""

    summary: Mapping[str, float]  # of `common.metrics.summarize_episodes`, prefix eval
    env_steps: int
    updates: int
    wall_seconds: float
    train_ratio: float  # realised
    train_ratio_target: float
    run_dir: Path
    plot: Path | None


def result_table(result: RunResult) -> Table:
    """The table at the end of a run. Paths are printed below it by `print_result`, unbroken."""
    table = _summary_table("result", result.summary)
    ratio = f"{result.train_ratio:,.4g} (target {result.train_ratio_target:,.4g})"
    table.add_row("env steps", f"{result.env_steps:,}")
    table.add_row("updates", f"{result.updates:,}")
    table.add_row("wall time", str(timedelta(seconds=round(result.wall_seconds))))
    table.add_row("realised train ratio", ratio)
    return table


def eval_table(summary: Mapping[str, float], title: str = "evaluation") -> Table:
    """Mean and spread of return, cost, cost rate and length of an evaluation."""
    return _summary_table(title, summary)


def print_result(result: RunResult, console: Console | None = None) -> None:
    """Prints the result table, then the paths of the run and of its plot on lines of their own."""
    console = console or Console()
    console.print(result_table(result))
    for name, path in (("run", result.run_dir), ("plot", result.plot)):
        if path is not None:
            console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)


_MODEL_ROWS = (
    ("model/cost_calibration", "imagined / true cost"),
    ("model/cost_recall", "costly steps foreseen (share)"),
    ("model/openloop_error/8", "position error after 8 imagined steps"),
)


def _summary_table(title: str, summary: Mapping[str, float]) -> Table:
    heading = Text(title, no_wrap=True, overflow="ignore")  # else broken at the width of the table
    table = Table(title=heading, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name in ("return", "cost"):
        spread = f"{summary[f'eval/{name}']:.2f} ± {summary[f'eval/{name}_std']:.2f}"
        confidence = summary.get(f"eval/{name}_ci")
        table.add_row(name, spread if confidence is None else f"{spread} (mean ± {confidence:.2f})")
    table.add_row("cost rate (per env step)", f"{summary['eval/cost_rate']:.4f}")
    table.add_row("episode length (env steps)", f"{summary['eval/length']:,.0f}")
    table.add_row("evaluation episodes", f"{summary['eval/episodes']:.0f}")
    for name, label in _MODEL_ROWS:
        if name in summary:
            table.add_row(label, f"{summary[name]:.2f}")
    return table


def _worth_showing(record: logging.LogRecord) -> bool:
    """Libraries only from a warning on: Orbax alone tells a dozen things per checkpoint."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in OWN_LOGGERS


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
