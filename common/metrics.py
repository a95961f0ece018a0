"""Metrics of a run: their names, aggregation between writes, and one writer for all sinks.

The x-axis of everything is `env_steps`. Names, and what they mean:

| name | meaning |
|---|---|
| train/return, train/cost, train/length | means over the training episodes ended since the last row |
| train/cost_rate | cost per env step of those episodes |
| eval/return, eval/return_std, eval/cost, eval/cost_std | over the evaluation episodes |
| eval/cost_rate, eval/length | as for training |
| eval/return_ci, eval/cost_ci | half widths of the 95 % confidence intervals of the means (Student's t) |
| eval/episodes | number of evaluation episodes |
| model/* | how right the world model was about those episodes, see deploy/calibration.py |
| safety/multiplier | Lagrange multiplier the actor trains under |
| loss/* | means of the training losses since the last row |
| time/* | seconds, rates per second and shares of time |
| replay/* | fill, realised train ratio, age of parameters |
| replay/mixed | replayed windows that were not one stream, must stay 0 |
| replay/lost_steps, train/lost_updates | totals that a killed replay server or learner did not remember |
| down/PART, recovered/PART | seconds that a part has been down, and after which it was back |

A row of `metrics.jsonl` is {"env_steps", "wall_seconds", name: value, ...}; a row of `episodes.jsonl`
is {"env_steps", "return", "cost", "length", "version", "source"}. NaN and infinities become null.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from common.config import LoggingConfig
from common.sinks import JsonlSink, Sink, TensorBoardSink, WandbSink, read_jsonl, truncate_jsonl
from common.types import EpisodeResult, UserError

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EPISODES = "episodes.jsonl"


def summarize_episodes(results: Sequence[EpisodeResult], prefix: str = "eval") -> dict[str, float]:
    """Means, standard deviations (of the population), 95 % confidence and cost per env step of episodes.

    The confidence interval of a mean is +- t s / sqrt(n) by Student's t (n - 1 degrees of freedom, s the
    sample's standard deviation): over layouts, for this one agent; other seeds of training vary more.
    """
    if not results:
        raise ValueError("no episodes to summarise")
    n = len(results)
    summary = {f"{prefix}/episodes": float(n)}
    for name, values in (("return", [r.return_ for r in results]), ("cost", [r.cost for r in results])):
        mean = sum(values) / n
        summary[f"{prefix}/{name}"] = mean
        std = summary[f"{prefix}/{name}_std"] = math.sqrt(sum((v - mean) ** 2 for v in values) / n)
        if n > 1:
            summary[f"{prefix}/{name}_ci"] = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n - 1)
    length = sum(r.length for r in results)
    summary[f"{prefix}/length"] = length / n
    summary[f"{prefix}/cost_rate"] = sum(r.cost for r in results) / length
    return summary


class Aggregator:
    """Collects scalars between two writes: `mean` averages, `count` adds up, `last` keeps the newest."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]
        self._counts: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def mean(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            entry = self._sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(value)
            entry[1] += 1

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a total that runs from the start of the process, for example of restarts."""
        self._counts[name] = self._counts.get(name, 0.0) + amount

    def last(self, values: Mapping[str, Any]) -> None:
        self._last.update({name: float(value) for name, value in values.items()})

    def pop(self) -> dict[str, float]:
        """Everything collected; means and last values start afresh, totals run on."""
        means = {name: total / number for name, (total, number) in self._sums.items()}
        collected = {**means, **self._last, **self._counts}
        self._sums, self._last = {}, {}
        return collected


class MetricsWriter:
    """All sinks of a run. A failing TensorBoard or W&B is switched off with one warning.

    `resume_env_steps` continues the files of the run directory at that env step: later rows are
    removed. Raises UserError when `metrics.jsonl` or `episodes.jsonl` cannot be written, when the
    directory already holds another run, and when W&B is online without a login.
    """

    def __init__(
        self,
        run_dir: Path,
        logging_cfg: LoggingConfig,
        config_dict: Mapping[str, Any],
        resume_env_steps: int | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        earlier = _prepare(run_dir, resume_env_steps)
        self._started = time.monotonic() - earlier
        self._episodes = Aggregator()
        self._metrics_file = JsonlSink(run_dir / METRICS)
        self._episodes_file = JsonlSink(run_dir / EPISODES)
        self._optional: dict[str, Sink] = {}
        if logging_cfg.tensorboard:
            self._open("TensorBoard", lambda: TensorBoardSink(run_dir / "tensorboard", resume_env_steps))
        if logging_cfg.wandb != "off":
            mode, project = logging_cfg.wandb, logging_cfg.wandb_project
            self._open("W&B", lambda: WandbSink(run_dir, mode, project, config_dict))

    def write(self, env_steps: int, values: Mapping[str, Any]) -> None:
        """A row of `values` and of the means of the episodes since the last one."""
        episodes = self._episodes.pop()
        if episodes:
            episodes["train/cost_rate"] = episodes["train/cost"] / episodes["train/length"]
        self._write(env_steps, {**episodes, **values})

    def episode(self, env_steps: int, result: EpisodeResult) -> None:
        """A finished training episode; its means appear in the next `write`."""
        row = {"return": result.return_, "cost": result.cost, "length": result.length}
        self._episodes_file.write(env_steps, {**row, "version": result.version, "source": result.source})
        self._episodes.mean({f"train/{name}": value for name, value in row.items()})

    def evaluation(self, env_steps: int, values: Mapping[str, Any]) -> None:
        """A row of evaluation results, see `summarize_episodes`."""
        self._write(env_steps, values)

    def close(self) -> None:
        """Closes every sink; never hangs and never raises."""
        for name in list(self._optional):
            self._guard(name, lambda sink: sink.close())
        self._metrics_file.close()
        self._episodes_file.close()

    def _write(self, env_steps: int, values: Mapping[str, Any]) -> None:
        wall_seconds = round(time.monotonic() - self._started, 6)  # two rows never share one
        self._metrics_file.write(env_steps, {"wall_seconds": wall_seconds, **values})
        for name in list(self._optional):
            self._guard(name, lambda sink: sink.write(env_steps, values))

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._optional[name] = make()
        except UserError:
            raise
        except Exception as error:
            logger.warning("%s could not be started; training goes on without it: %s", name, error)

    def _guard(self, name: str, action: Callable[[Sink], None]) -> None:
        try:
            action(self._optional[name])
        except Exception as error:  # whatever a logging service raises, training is worth more
            del self._optional[name]
            logger.warning("%s failed and is switched off: %s", name, error)


def cut_back(run_dir: Path, env_steps: int, updates: float = math.inf) -> None:
    """Removes what a run has written beyond the checkpoint from which it goes on.

    The learner may have gone on while nobody acted: of rows at the same env steps, `updates` tells.
    Raises UserError where the files cannot be written.
    """
    try:
        truncate_jsonl(run_dir / METRICS, env_steps, {"train/updates": updates})
        truncate_jsonl(run_dir / EPISODES, env_steps)
    except OSError as error:
        raise UserError(f"cannot cut {run_dir / METRICS} back for --resume: {error.strerror}") from error


def _prepare(run_dir: Path, resume_env_steps: int | None) -> float:
    """Cuts the files of an earlier run back to where it resumes; returns its wall-clock seconds."""
    metrics, episodes = run_dir / METRICS, run_dir / EPISODES
    if resume_env_steps is None:
        if any(path.is_file() and path.stat().st_size for path in (metrics, episodes)):
            raise UserError(
                f"{run_dir} already holds a run: continue it with --resume {run_dir}, "
                "or choose another --run-dir"
            )
        return 0.0
    cut_back(run_dir, resume_env_steps)
    rows = read_jsonl(metrics)
    return float(rows[-1].get("wall_seconds") or 0.0) if rows else 0.0
