"""The command line: safedreamer train | submit | job | eval | import | plot | doctor | list."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common import checkpoint, config_checks, configuration, versions
from common.config import Config
from common.types import UserError
from common.untrusted import printable
from deploy import shipping
from deploy.eval_files import checked_files
from deploy.flags import EvalArgs, ImportArgs, JobArgs, PlotArgs, SubmitArgs, parse, parse_train

USAGE = """usage: safedreamer COMMAND [OPTIONS]

  train    train an agent, or continue one        safedreamer train --help
  submit   train on a Ray cluster, as a job       safedreamer submit --help
  job      status, logs, stop or list of jobs     safedreamer job --help
  eval     evaluate a run or a checkpoint         safedreamer eval --help
  import   convert a published checkpoint         safedreamer import --help
  plot     curves of several runs in one figure   safedreamer plot --help
  doctor   check this machine
  list     methods, sizes and tasks
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 user error, 128 + n signal n."""
    shipping.take_secrets()
    argv = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": _train,
        "submit": _submit,
        "job": _job,
        "eval": _eval,
        "import": _import,
        "plot": _plot,
        "doctor": _doctor,
        "list": _list,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if argv else 2)
    _keep_compiled()
    try:
        if argv[0] not in commands:
            near = configuration.did_you_mean(argv[0], commands)
            raise UserError(f"there is no command `{argv[0]}`{near}\n{USAGE.rstrip()}")
        code = commands[argv[0]](argv[1:])
    except UserError as error:
        print(f"safedreamer: {printable(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of `safedreamer list | head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stdout.flush()
    sys.exit(code)


def _keep_compiled() -> None:
    """Lets compiled programs survive in the user's cache: the second run starts in seconds.

    Where this user cannot write (a container under a bare user id), JAX would warn of every program.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(home) / "safedreamer" / "jax"
    there = next((folder for folder in (cache, *cache.parents) if os.path.exists(folder)), cache)
    if cache.is_absolute() and os.access(there, os.W_OK | os.X_OK):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def _train(argv: list[str]) -> int:
    args, saved, warm = parse_train(argv)
    cfg = args.settings
    for flag, group, name in (
        ("wandb", "logging", "wandb"),
        ("ray_address", "ray", "address"),
        ("max_staleness", "actors", "max_staleness"),
    ):
        value = getattr(args, flag)
        if value is not None:
            cfg = configuration.merge(cfg, {group: {name: value}}, f"--{flag.replace('_', '-')}")
    config_checks.check(cfg)
    from deploy import run_dir as runs

    if saved is not None:
        runs.check_resumable(saved, cfg)
    if args.print_config:
        print(configuration.dump(cfg), end="")
        return 0
    if args.resume is not None:
        runs.check_unfinished(args.resume, cfg)
        _tell_where_it_comes_from(checkpoint.latest(args.resume / runs.CHECKPOINTS))
        return _run(cfg, args.resume.absolute(), resume=True)
    from deploy import wiring
    from deploy.train import check

    cfg = wiring.settled(cfg)
    check(cfg, warm)  # before a directory is made
    _tell_where_it_comes_from(None if warm is None else warm.checkpoint)
    run = runs.create(args.run_dir or runs.default_path(cfg), cfg)
    try:
        if warm is not None:
            from deploy import warm_start

            warm_start.write(run, warm)
        return _run(cfg, run, resume=False)
    finally:
        runs.discard_unused(run)


def _tell_where_it_comes_from(found: Path | None) -> None:
    """One line where a training goes on from a checkpoint that was made on another MuJoCo."""
    meta = {} if found is None else checkpoint.read_meta(found)
    _tell_of_other_physics(versions.recorded(meta.get("versions")))


def _tell_of_other_physics(trained: Sequence[versions.Stretch]) -> None:
    if (sentence := versions.other_physics(trained)) is not None:
        print(f"safedreamer: {sentence}", file=sys.stderr)


def _run(cfg: Config, run: Path, *, resume: bool) -> int:
    from deploy.outcome import exit_code
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


def _submit(argv: list[str]) -> int:
    own, separator, command = _split(argv, "--")
    args = parse(SubmitArgs, own, "submit")
    if not separator:
        raise UserError("what the job does stands after --: safedreamer submit --address URL -- train ...")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from deploy.submit import submit

    return submit(args, command)


def _split(words: list[str], separator: str) -> tuple[list[str], bool, list[str]]:
    if separator not in words:
        return words, False, []
    at = words.index(separator)
    return words[:at], True, words[at + 1 :]


def _job(argv: list[str]) -> int:
    args = parse(JobArgs, argv, "job")
    from deploy import jobs

    if args.action == "list":
        return jobs.show_all(args.address)
    if not args.id:
        raise UserError(f"name the job: safedreamer job {args.action} ID; `safedreamer job list` shows them")
    if args.action == "status":
        return jobs.show(args.address, args.id)
    if args.action == "stop":
        return jobs.stop(args.address, args.id, wait=args.wait)
    return jobs.logs(args.address, args.id, follow=args.follow)


def _eval(argv: list[str]) -> int:
    args = parse(EvalArgs, argv, "eval")
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
    trained_on = [] if args.random else versions.recorded(meta.get("versions"))
    _tell_of_other_physics(trained_on)
    summary = evaluate.run(
        cfg,
        params,
        episodes=args.episodes,
        seed=args.seed,
        version=meta["version"],
        files=files,
        random=args.random,
    )
    method = "random actions" if args.random else cfg.method
    if args.json:
        about = {"task": cfg.task, "method": method, "env_steps": meta["env_steps"], "seed": args.seed}
        scores = {name.removeprefix("eval/"): value for name, value in summary.items()}
        print(json.dumps(about | scores | versions.of_result(trained_on)))
    else:
        Console().print(eval_table(summary, f"{method} on {cfg.task}, {meta['env_steps']:,} env steps"))
        for line in files.lines():
            print(line)
    return 0


def _import(argv: list[str]) -> int:
    args = parse(ImportArgs, argv, "import")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from deploy.importing import Wanted, import_checkpoint

    wanted = Wanted(args.method, args.task, args.observation, args.config, args.stoch, args.classes)
    print(f"checkpoint: {import_checkpoint(args.path, wanted, args.out)}")
    print(f"try it: safedreamer eval {args.out}")
    print(f"train on: safedreamer train --from-checkpoint {args.out}")
    return 0


def _doctor(argv: list[str]) -> int:
    _no_options("doctor", argv)
    from deploy.doctor import run_doctor

    return run_doctor(Console())


def _plot(argv: list[str]) -> int:
    args = parse(PlotArgs, argv, "plot")
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


if __name__ == "__main__":  # as a job runs it, from a copy of the program
    main()
