"""The options of the commands, and their parser."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from common import configuration
from common.config import Config
from common.types import UserError
from common.yaml_file import read_yaml

if TYPE_CHECKING:  # it brings JAX along, for which `--help` need not wait
    from deploy.warm_start import WarmStart

_Args = TypeVar("_Args")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class TrainArgs:
    """Train an agent. The options below `run` choose presets and files; all others are single settings,
    shown with the defaults that the chosen presets give them."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Directory of the new run. Default: runs/TASK/METHOD-SIZE-seedN-TIME."""
    resume: Path | None = None
    """Continue this run with its saved configuration; only env steps, logging, evaluation, checkpoints,
    supervision, Ray, backend, inference, precision, replay host and the numbers of actors and devices may
    change."""
    from_checkpoint: Path | None = None
    """Begin a new run with what a run or a checkpoint holds: parameters, optimizer states, multiplier. It
    takes the checkpoint's configuration; what changes no shapes may change. The loaded policy acts from the
    start, unless learner.prefill is given."""
    config: tuple[Path, ...] = field(default=())
    """YAML files with settings; they win over presets, flags win over them."""
    wandb: Literal["online", "offline", "off"] | None = None
    """Short for --logging.wandb."""
    max_staleness: int | None = None
    """Short for --actors.max-staleness."""
    ray_address: str | None = None
    """Short for --ray.address: the Ray cluster to run on."""
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
    random: bool = False
    """Play uniform random actions on the same layouts instead, for comparison."""
    json: bool = False
    """Print one JSON object instead of a table."""
    video: Path | None = None
    """Write the first episode as an mp4: the outside view, the agent's cameras, reward and cost so far."""
    prediction_video: Path | None = None
    """Write what the world model predicts without looking as an mp4: true, model, error (vision)."""
    prediction_plot: Path | None = None
    """Plot predicted against true reward and cost as a png. Default: next to the prediction video, if any."""


@dataclass(frozen=True)
class ImportArgs:
    """Convert a checkpoint that the SafeDreamer authors published. Sizes come from the shapes of its arrays,
    all other settings from the method's preset of size `paper`."""

    path: tyro.conf.Positional[Path]
    """The published checkpoint.ckpt."""
    method: str
    """Its method: bsrp_lag, osrp, osrp_lag, osrp_vector or dreamerv3."""
    task: str
    """The task that it was trained on, e.g. SafetyPointGoal1-v0."""
    out: Path
    """Directory of the new checkpoint, for `eval` and `train --from-checkpoint`."""
    observation: str | None = None
    """What it observes. Default: what the method observes at size `paper`."""
    config: tuple[Path, ...] = field(default=())
    """YAML files with settings."""
    stoch: int | None = None
    """Categorical variables of its latent state, where it has not as many classes as categoricals."""
    classes: int | None = None
    """Classes of each."""


@dataclass(frozen=True)
class PlotArgs:
    """Draw the evaluations of several runs over env steps: return and cost."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("curves.png")
    """The figure to write."""
    mean: bool = False
    """One line: the mean over the runs, and their range."""


@dataclass(frozen=True)
class SubmitArgs:
    """Train on a Ray cluster, as a job of it: `safedreamer submit [OPTIONS] -- train ...`."""

    address: str | None = None
    """The cluster's dashboard, http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, else this machine's."""
    run_dir: Path | None = None
    """Directory of the new run: an absolute path on storage that all nodes share."""
    submission_id: str | None = None
    """Name of the job. Default: safedreamer-TIME-RANDOM."""
    python: str = "python"
    """The cluster's Python, of the version that runs here, with its lock (requirements/) installed."""
    wait: bool = True
    """Follow the logs until the job ends, and exit with 0 if it has succeeded, else 1."""


@dataclass(frozen=True)
class JobArgs:
    """Look after the jobs of a Ray cluster. `stop` lets the run save a checkpoint first."""

    action: tyro.conf.Positional[Literal["status", "logs", "stop", "list"]]
    """What to do."""
    id: tyro.conf.Positional[str] = ""
    """Which job (not for list)."""
    address: str | None = None
    """The cluster's dashboard, http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, else this machine's."""
    follow: bool = False
    """Of logs: go on until the job ends."""
    wait: bool = True
    """Of stop: until the job has ended."""


class Train(NamedTuple):
    """What `safedreamer train` is told."""

    args: TrainArgs
    saved: Config | None  # configuration of the run that is resumed
    warm: WarmStart | None  # where a new run begins, if not untrained


def parse_train(argv: list[str]) -> Train:
    """The arguments over their defaults.

    Presets and files, or what was saved with a run or checkpoint, are read first: they give the flags
    their defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("method", "size", "task"):
        first.add_argument(f"--{name}")
    first.add_argument("--config", nargs="+", type=Path, action="extend", default=[])
    first.add_argument("--resume", type=Path)
    first.add_argument("--from-checkpoint", "--from_checkpoint", dest="checkpoint", type=Path)
    first.add_argument("--env.observation", dest="observation")
    first.add_argument("--learner.prefill", dest="prefill")
    try:
        chosen, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:  # a flag without its value
        raise UserError(f"{error.argument_name}: {error.message}") from None
    if chosen.resume is not None and chosen.checkpoint is not None:
        raise UserError("--resume goes on with a run, --from-checkpoint begins a new one; give one of them")
    if chosen.checkpoint is not None:
        return _parse_warm(argv, chosen)
    saved = None
    if chosen.resume is None:
        defaults = configuration.load(
            chosen.method, chosen.size, chosen.task, chosen.config, chosen.observation
        )
    else:
        from deploy import run_dir as runs

        saved = runs.read_config(chosen.resume)
        defaults = _with_files(saved, chosen.config)
    args = parse(TrainArgs, argv, "train", default=TrainArgs(defaults))
    if args.resume is not None and args.run_dir is not None:
        raise UserError("--resume continues in the run's own directory; leave out --run-dir")
    return Train(args, saved, None)


def _parse_warm(argv: list[str], chosen: argparse.Namespace) -> Train:
    from deploy import warm_start

    found, saved = warm_start.saved_config(chosen.checkpoint)
    args = parse(TrainArgs, argv, "train", default=TrainArgs(_with_files(saved, chosen.config)))
    warm_start.check_settings(saved, args.settings)
    given = chosen.prefill is not None or any(
        "learner.prefill" in configuration.flatten(read_yaml(path)) for path in chosen.config
    )
    random_steps = args.settings.learner.prefill if given else 0
    return Train(args, None, warm_start.WarmStart(found, random_steps))


def _with_files(config: Config, files: Iterable[Path]) -> Config:
    for path in files:
        config = configuration.merge(config, read_yaml(path), str(path))
    return config


_NUMBERS = tyro.constructors.ConstructorRegistry()


@_NUMBERS.primitive_rule
def _whole_numbers(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """As in a YAML file, 1e6 is a million."""
    if info.type is not int:
        return None

    def read(words: list[str]) -> int:
        for convert in (int, float):
            with contextlib.suppress(ValueError):
                number = convert(words[0])
                if number == number // 1:  # not of nan and the infinities
                    return int(number)
        raise ValueError(f"{words[0]} is not a whole number")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda x: isinstance(x, int) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)],
    )


def parse(form: type[_Args], argv: list[str], command: str, default: _Args | None = None) -> _Args:
    """tyro's parser; of its page-long panel about an error, the sentence that says what is wrong."""
    panel = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(panel), _NUMBERS:
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
    options = [word.rstrip(",") for line in proposed for word in line.split() if word.startswith("--")]
    word = sentence.partition(": ")[2].partition(",")[0]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.0)
    hint = f" (did you mean `{near[0]}`?)" if near else ""
    raise UserError(f"{sentence}{hint}; `safedreamer {command} --help` explains the options")
