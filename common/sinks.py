"""The files and services that rows of metrics go to: JSON lines, TensorBoard, Weights & Biases.

Names of metrics are described in `common.metrics`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TextIO

from common.types import UserError
from common.untrusted import is_count

logger = logging.getLogger(__name__)

_LONGEST_ROW = 100_000  # characters of a line; rows have about 2,000
WANDB_TIMEOUT = 30.0  # seconds that starting and finishing a W&B run may take

# TensorBoard and W&B group curves by what stands before the slash: one group per quantity.
PANELS = {"return": "reward", "cost": "cost", "cost_rate": "cost_rate"}


def panel_name(name: str) -> str:
    """`eval/cost_rate` -> `cost_rate/eval`, so that training and evaluation share a panel group."""
    group, _, quantity = name.partition("/")
    if name == "safety/multiplier":
        return "multiplier/multiplier"
    base = quantity.removesuffix("_std")
    if group not in ("train", "eval") or base not in PANELS:
        return name
    return f"{PANELS[base]}/{group}" + ("_std" if quantity.endswith("_std") else "")


class Sink(Protocol):
    """Where rows of scalars go."""

    def write(self, env_steps: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object per line, on disk when `write` returns. Raises UserError when that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, env_steps: int, values: Mapping[str, Any]) -> None:
        row = {"env_steps": int(env_steps), **{name: _json_value(value) for name, value in values.items()}}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what an earlier failed write left in the buffer
            logger.warning("closing %s: %s", self._path, error)

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self._path}: {error.strerror}. Make room or choose another --run-dir, "
            "then continue with --resume."
        )


class TensorBoardSink:
    """A TensorBoard event file, written record by record without importing TensorFlow.

    `resume_env_steps` hides the rows that earlier event files of the run hold beyond it.
    """

    def __init__(self, directory: Path, resume_env_steps: int | None = None) -> None:
        # tensorboard's own EventFileWriter would import TensorFlow for its file system.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        events: Any = event_pb2  # generated at import time: type checkers see no fields
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        directory.mkdir(parents=True, exist_ok=True)
        host = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(2)}"
        path = directory / f"events.out.tfevents.{int(time.time()):010d}.{host}"
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._records = RecordWriter(self._file)
        self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_env_steps is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._append(self._event(wall_time=time.time(), step=resume_env_steps + 1, session_log=start))

    def write(self, env_steps: int, values: Mapping[str, Any]) -> None:
        scalars = [
            self._summary.Value(tag=panel_name(name), simple_value=float(value))
            for name, value in values.items()
        ]
        summary = self._summary(value=scalars)
        self._append(self._event(wall_time=time.time(), step=int(env_steps), summary=summary))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()


class WandbSink:
    """A Weights & Biases run under `run_dir/wandb`; a resumed run keeps its id."""

    def __init__(self, run_dir: Path, mode: str, project: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # also read by the service process
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to third parties
        import wandb

        if mode == "online" and wandb.api.api_key is None:
            raise UserError(
                "W&B is set to online, but nobody is logged in: run `wandb login`, "
                "or use --wandb offline (and `wandb sync` later), or --wandb off"
            )
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            # Without these, starting and even the end of the process wait for ever for a silent server.
            x_graphql_retry_max=2,
            x_graphql_retry_wait_max_seconds=2.0,
            x_graphql_timeout_seconds=10.0,
            init_timeout=WANDB_TIMEOUT,
            finish_timeout=WANDB_TIMEOUT,
        )
        start = partial(
            wandb.init,
            project=project,
            name=run_dir.name,
            id=_wandb_id(run_dir),
            dir=run_dir,
            mode="online" if mode == "online" else "offline",
            resume="allow",
            config=dict(config),
            settings=settings,
        )
        self._run: Any = _within(WANDB_TIMEOUT, start)  # init_timeout does not bound all of it
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")

    def write(self, env_steps: int, values: Mapping[str, Any]) -> None:
        row = {panel_name(name): float(value) for name, value in values.items()}
        self._run.log({**row, "env_steps": int(env_steps)})

    def close(self) -> None:
        _within(2 * WANDB_TIMEOUT, self._run.finish)


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """The result of `action`, or TimeoutError: it goes on in a thread that nobody waits for."""
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, action()))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=run, name="wandb", daemon=True).start()
    try:
        succeeded, result = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if not succeeded:
        raise result
    return result


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a file, in order; [] where there is no file. A half-written line is left out."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [row for row in map(_parse, _lines(file)) if row is not None]


def truncate_jsonl(path: Path, env_steps: int, most: Mapping[str, float] = MappingProxyType({})) -> int:
    """Removes rows beyond `env_steps` and half-written lines; returns how many lines went.

    Of rows at the same env steps, those go too in which a value is above its bound in `most`.
    """
    if not path.exists():
        return 0
    kept, removed = path.with_name(path.name + ".kept"), 0
    with (
        open(path, encoding="utf-8", errors="replace") as source,
        open(kept, "w", encoding="utf-8") as target,
    ):
        for line in _lines(source):
            row = _parse(line)
            if row is None or row["env_steps"] > env_steps or _exceeds(row, most):
                removed += 1
            else:
                target.write(line.rstrip("\n") + "\n")
    os.replace(kept, path)
    return removed


def _exceeds(row: Mapping[str, Any], most: Mapping[str, float]) -> bool:
    values = ((row.get(name), bound) for name, bound in most.items())
    return any(isinstance(value, int | float) and value > bound for value, bound in values)


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; one that is too long to be a row, in pieces, which are none either."""
    return iter(lambda: file.readline(_LONGEST_ROW), "")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_count(row.get("env_steps")) else None


def _json_value(value: Any) -> Any:
    """A value that strict JSON can hold: numpy numbers become Python's, NaN and infinities null."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _wandb_id(run_dir: Path) -> str:
    file = run_dir / "wandb" / "run_id.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
