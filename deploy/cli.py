"""The command line: safedreamer train | eval | plot | doctor | list."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from common import config as configuration
from common.config import Config
from common.types import UserError
from deploy.eval_files import checked_files

_Args = TypeVar("_Args")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

USAGE = """usage: safedreamer COMMAND [OPTIONS]

  train    train an agent, or continue one        safedreamer train --help
  eval     evaluate a run or a checkpoint         safedreamer eval --help
  plot     curves of several runs in one figure   safedreamer plot --help
  doctor   check this machine
  list     methods, sizes and tasks
"""


@dataclass(frozen=True)
class TrainArgs:
    """Train an agent. The options below `run` choose presets and files; all others are single settings,
    shown with the defaults that the chosen presets give them."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Directory of the new run. Default: runs/TASK/METHOD-SIZE-seedN-TIME."""
    resume: Path | None = None
    """Continue this run with its saved configuration; only env steps, logging, evaluation, checkpoints,
    backend and number of actors may change."""
    config: tuple[Path, ...] = field(default=())
    """YAML files with settings; they win over presets, flags win over them."""
    wandb: Literal["online", "offline", "off"] | None = None
    """Short for --logging.wandb."""
    print_config: bool = False
    """Print the resolved configuration as YAML and stop."""


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate the policy of a run (its newest checkpoint) or of one checkpoint, without exploration."""

    path: tyro.conf.Positional[Path]
    """Run directory or checkpoint."""
    episodes: int = 10
    """Episodes, one per held-out layout."""
    seed: int = 0
    """Seed of the layouts."""
    task: str | None = None
    """Refuse a checkpoint of another task."""
    observation: str | None = None
    """Refuse a checkpoint of another observation."""
    json: bool = False
    """Print one JSON object instead of a table."""
    video: Path | None = None
    """Write the first episode as an mp4: the outside view, the agent's cameras, reward and cost so far."""
    prediction_video: Path | None = None
    """Write what the world model predicts without looking as an mp4: true, model, error (vision)."""
    prediction_plot: Path | None = None
    """Plot predicted against true reward and cost as a png. Default: next to the prediction video, if any."""


@dataclass(frozen=True)
class PlotArgs:
    """Draw the evaluations of several runs over env steps: return and cost."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("curves.png")
    """The figure to write."""
    mean: bool = False
    """One line: the mean over the runs, and their range."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 user error, 128 + n signal n."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "eval": _eval, "plot": _plot, "doctor": _doctor, "list": _list}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if argv else 2)
    # Compiled programs survive in the user's cache: the second run starts in seconds.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safedreamer" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    try:
        if argv[0] not in commands:
            near = configuration.did_you_mean(argv[0], commands)
            raise UserError(f"there is no command `{argv[0]}`{near}\n{USAGE.rstrip()}")
        code = commands[argv[0]](argv[1:])
    except UserError as error:
        print(f"safedreamer: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of `safedreamer list | head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stdout.flush()
    sys.exit(code)


def _train(argv: list[str]) -> int:
    args, saved = _parse_train(argv)
    cfg = args.settings
    if args.wandb is not None:
        cfg = configuration.merge(cfg, {"logging": {"wandb": args.wandb}}, "--wandb")
    configuration.check(cfg)
    from deploy import run_dir as runs

    if saved is not None:
        runs.check_resumable(saved, cfg)
    if args.print_config:
        print(configuration.dump(cfg), end="")
        return 0
    if args.resume is not None:
        runs.check_unfinished(args.resume, cfg)
        return _run(cfg, args.resume.absolute(), resume=True)
    from deploy.train import check

    check(cfg)  # before a directory is made
    run = runs.create(args.run_dir or runs.default_path(cfg), cfg)
    try:
        return _run(cfg, run, resume=False)
    finally:
        runs.discard_unused(run)


def _run(cfg: Config, run: Path, *, resume: bool) -> int:
    from deploy.driver import exit_code
    from deploy.signals import Interrupted
    from deploy.train import train

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("deploy").setLevel(logging.INFO)
    print(f"run: {run}", flush=True)
    try:
        outcome = train(cfg, run, resume=resume)
    except Interrupted as interruption:
        print("safedreamer: stopped; nothing was saved since the last checkpoint, if any", file=sys.stderr)
        return 128 + interruption.number
    if outcome.signal is not None:
        finished = outcome.counters.env_steps >= cfg.env_steps
        command = f"eval {run}" if finished else f"train --resume {run}"
        print(f"safedreamer: stopped and saved; go on with: safedreamer {command}", file=sys.stderr)
    return exit_code(outcome)


def _parse_train(argv: list[str]) -> tuple[TrainArgs, Config | None]:
    """The arguments, and the saved configuration of the run that is resumed, if any.

    Presets and files are read first: they give the flags their defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("method", "size", "task"):
        first.add_argument(f"--{name}")
    first.add_argument("--config", nargs="+", type=Path, action="extend", default=[])
    first.add_argument("--resume", type=Path)
    first.add_argument("--env.observation", dest="observation")
    try:
        chosen, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:  # a flag without its value
        raise UserError(f"{error.argument_name}: {error.message}") from None
    saved = None
    if chosen.resume is None:
        defaults = configuration.load(
            chosen.method, chosen.size, chosen.task, chosen.config, chosen.observation
        )
    else:
        from deploy import run_dir as runs

        defaults = saved = runs.read_config(chosen.resume)
        for path in chosen.config:
            defaults = configuration.merge(defaults, configuration.read_yaml(path), str(path))
    args = _parse(TrainArgs, argv, "train", default=TrainArgs(defaults))
    if args.resume is not None and args.run_dir is not None:
        raise UserError("--resume continues in the run's own directory; leave out --run-dir")
    return args, saved


def _parse(form: type[_Args], argv: list[str], command: str, default: _Args | None = None) -> _Args:
    """tyro's parser; of its page-long panel about an error, the sentence that says what is wrong."""
    panel = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.cli(form, args=argv, prog=f"safedreamer {command}", **extra)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    paragraphs: list[list[str]] = [[]]
    for line in _ESCAPES.sub("", panel.getvalue()).splitlines()[1:]:  # below the title
        text = line.strip(" │")
        if set(text) <= set("─-╰╯"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(text)
    paragraphs = [lines for lines in paragraphs if lines]
    sentence = " ".join(paragraphs[0]).removesuffix(".")
    proposed = [line for lines in paragraphs if lines[0].startswith("Perhaps") for line in lines[1:]]
    options = [line.split()[0] for line in proposed if line.startswith("--")]
    word = sentence.partition(": ")[2].partition(",")[0]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.0)
    hint = f" (did you mean `{near[0]}`?)" if near else ""
    raise UserError(f"{sentence}{hint}; `safedreamer {command} --help` explains the options")


def _eval(argv: list[str]) -> int:
    args = _parse(EvalArgs, argv, "eval")
    if args.episodes < 1:
        raise UserError("--episodes must be at least 1")
    if args.seed < 0:
        raise UserError("--seed must be at least 0")
    files = checked_files(args.video, args.prediction_video, args.prediction_plot)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from common.terminal import eval_table
    from deploy import evaluate

    cfg, params, meta, skipped = evaluate.load(args.path)
    for sentence in skipped:
        print(f"safedreamer: {sentence}; an older one is used", file=sys.stderr)
    evaluate.check_fit(cfg, args.task, args.observation)
    summary = evaluate.run(
        cfg, params, episodes=args.episodes, seed=args.seed, version=meta["version"], files=files
    )
    if args.json:
        about = {"task": cfg.task, "method": cfg.method, "env_steps": meta["env_steps"], "seed": args.seed}
        print(json.dumps(about | {name.removeprefix("eval/"): value for name, value in summary.items()}))
    else:
        Console().print(eval_table(summary, f"{cfg.method} on {cfg.task}, {meta['env_steps']:,} env steps"))
        for line in files.lines():
            print(line)
    return 0


def _doctor(argv: list[str]) -> int:
    _no_options("doctor", argv)
    from deploy.doctor import run_doctor

    return run_doctor(Console())


def _plot(argv: list[str]) -> int:
    args = _parse(PlotArgs, argv, "plot")
    from common.plots import plot_runs
    from deploy import run_dir as runs

    if not args.runs:
        raise UserError("name at least one run directory: safedreamer plot runs/TASK/RUN ...")
    for path in args.runs:
        runs.read_config(path)  # refuses what is no run
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        raise UserError(f"--out must be a .png file in a directory that exists, not {args.out}")
    print(f"plot: {plot_runs(args.runs, args.out, aggregate=args.mean)}")
    return 0


def _list(argv: list[str]) -> int:
    _no_options("list", argv)
    from actors.tasks import list_tasks

    for kind in ("method", "size"):
        print(f"{kind}s (--{kind})")
        for name in configuration.presets(kind):
            print(f"  {name:<14}{configuration.describe(kind, name)}")
    print("tasks (--task)")
    for task in list_tasks():
        print(f"  {task}")
    return 0


def _no_options(command: str, argv: list[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0)
    if argv:
        raise UserError(f"`safedreamer {command}` takes no options, but got {argv[0]}")
