"""`safedreamer submit`: a training as a job of a Ray cluster."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import time
from pathlib import Path

from common import config_checks, configuration
from common.types import UserError
from deploy import jobs, shipping
from deploy.flags import SubmitArgs, TrainArgs, parse, parse_train

_GIVEN = "given"  # directory of the shipped program with the user's own --config files


def submit(args: SubmitArgs, command: list[str]) -> int:
    """Checks the command here, ships the program, and follows the job. Returns the exit code.

    Raises UserError for a command that the job would refuse, and when the dashboard does not take it.
    """
    if command[:1] != ["train"]:
        word = command[0] if command else "nothing"
        raise UserError(
            f"only `train` runs as a job, not {word}: safedreamer submit --address URL -- train ..."
        )
    words = command[1:]
    train = _checked(words)
    run = _run_of(args, train)
    job = args.submission_id or f"safedreamer-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if not re.fullmatch(r"[\w.-]+", job):
        raise UserError(f"--submission-id holds letters, digits, dots, - and _, not {job}")
    ray = jobs.client(args.address)
    open_, secret = shipping.wandb(os.environ)
    with shipping.program() as directory:
        words = _ship_files(words, directory)
        if secret:
            shipping.hide_secrets(directory, secret, job)
        # The last word wins, also over what a resumed run has saved.
        words += ["--ray-address", "auto"]
        if train.resume is None and train.run_dir is None:
            words += ["--run-dir", str(run)]
        try:
            ray.submit_job(
                # No shell in between: SIGTERM shall reach the driver and nothing else.
                entrypoint="exec " + shlex.join([args.python, "-m", "deploy.cli", "train", *words]),
                submission_id=job,
                metadata={jobs.RUN: str(run)},
                runtime_env={
                    "working_dir": str(directory),
                    "env_vars": open_ | {"RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_SECONDS)},
                },
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise UserError(f"there is a job {job} already; choose another --submission-id") from None
            raise UserError(f"the cluster refused the job: {' '.join(str(error).split())[:300]}") from error
    print(f"job: {job}\nrun: {run}", flush=True)
    return jobs.watch(ray, job, args.address) if args.wait else 0


def _checked(words: list[str]) -> TrainArgs:
    """The parsed arguments of `train`. What lies on the cluster's storage alone is checked there."""
    # What is not known yet has defaults here: enough to know every flag and every type.
    first = parse(TrainArgs, words, "train", default=TrainArgs(configuration.load()))
    if first.ray_address is not None:
        raise UserError("the job runs on the cluster that it is submitted to: leave out --ray-address")
    if first.print_config:
        raise UserError("--print-config needs no cluster: safedreamer train --print-config ...")
    for name, path in (("resume", first.resume), ("from-checkpoint", first.from_checkpoint)):
        if path is not None and not path.is_absolute():
            raise UserError(f"--{name} must be an absolute path on the cluster's storage, not {path}")
        if path is not None and not path.exists():
            return first
    args, saved, warm = parse_train(words)
    on_cluster = configuration.merge(args.settings, {"ray": {"address": "auto"}}, "submit")
    config_checks.check(on_cluster)
    from deploy import run_dir as runs
    from deploy.train import check

    if saved is not None:
        runs.check_resumable(saved, on_cluster)
    check(on_cluster, warm)
    return args


def _run_of(args: SubmitArgs, train: TrainArgs) -> Path:
    given = [path for path in (args.run_dir, train.run_dir, train.resume) if path is not None]
    if not given:
        raise UserError("give --run-dir: an absolute path on storage that all nodes of the cluster share")
    if len(given) > 1:
        raise UserError("a job has one run directory: give one --run-dir, or --resume alone")
    if not given[0].is_absolute():
        raise UserError(
            f"a job runs in a copy of the program: --run-dir must be an absolute path, not {given[0]}"
        )
    return given[0]


def _ship_files(words: list[str], directory: Path) -> list[str]:
    """Puts --config files into the shipped program; returns the words with the paths that they have there."""
    shipped: list[str] = []
    reading = False
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            reading = flag == "--config"
            word = f"{flag}={_ship(value, directory)}" if reading and equals else word
        elif reading:
            word = _ship(word, directory)
        shipped.append(word)
    return shipped


def _ship(file: str, directory: Path) -> str:
    target = directory / _GIVEN
    target.mkdir(exist_ok=True)
    name = f"{len(list(target.iterdir()))}-{Path(file).name}"
    shutil.copy(file, target / name)
    return f"{_GIVEN}/{name}"
