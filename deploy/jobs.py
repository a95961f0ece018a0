"""`safedreamer job`: what runs on a cluster, what it says, and how it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus, JobSubmissionClient

from common.configuration import did_you_mean
from common.types import UserError
from deploy.saving import SAVE_REPLAY_SECONDS, SAVE_SECONDS

STOP_SECONDS = int(SAVE_SECONDS + SAVE_REPLAY_SECONDS)  # that a stopped job may take to save
RUN = "run"  # in a job's metadata: its run directory
_LOCAL = "http://127.0.0.1:8265"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # with either set, Ray ignores its argument
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 20.0
_POLL_SECONDS = 0.5


def client(address: str | None) -> JobSubmissionClient:
    """Talks to the dashboard. Raises UserError in bounded time when there is none."""
    url = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or _LOCAL).rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise UserError(f"--address must be the cluster's dashboard, e.g. http://HEAD:8265, not {url}")
    try:
        answer = requests.get(f"{url}/api/version", timeout=(_CONNECT_SECONDS, _READ_SECONDS))
        answer.raise_for_status()
        answer.json()["ray_version"]
    except (requests.RequestException, ValueError, KeyError, TypeError):
        raise UserError(
            f"no Ray dashboard answers at {url}; give --address http://HEAD:8265 (from outside, `ray "
            "dashboard deploy/cluster.yaml` or `ssh -L 8265:localhost:8265 HEAD` brings it to this machine)"
        ) from None
    for name in _ADDRESSES:
        os.environ.pop(name, None)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(url)


def show(address: str | None, job: str) -> int:
    """Prints the state of a job."""
    print(_line(_details(client(address), job)))
    return 0


def show_all(address: str | None) -> int:
    """Prints the state of every job that was submitted, the newest first."""
    listed = [details for details in client(address).list_jobs() if details.submission_id]
    for details in sorted(listed, key=lambda details: details.start_time or 0, reverse=True):
        print(_line(details))
    return 0


def logs(address: str | None, job: str, *, follow: bool) -> int:
    """Prints what a job has said; with `follow` until it ends, and its exit code then."""
    ray = client(address)
    if follow:
        return watch(ray, job, address)
    _details(ray, job)
    print(ray.get_job_logs(job), end="")
    return 0


def stop(address: str | None, job: str, *, wait: bool) -> int:
    """SIGTERM for the job's driver, which saves a checkpoint and ends; `wait` until it has."""
    ray = client(address)
    details = _details(ray, job)
    if details.status.is_terminal():
        print(f"{job} has ended before: {details.status}")
        return 0
    ray.stop_job(job)
    print(f"{job} saves a checkpoint and stops", flush=True)
    deadline = time.monotonic() + STOP_SECONDS + 60
    while wait and not _details(ray, job).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"{job} has not stopped; look at it with `{_command('logs', job, address)}`")
        time.sleep(_POLL_SECONDS)
    if wait:
        said = [line for line in ray.get_job_logs(job).splitlines() if line.startswith("safedreamer: ")]
        print("\n".join([f"{job}: {_details(ray, job).status}", *said[-1:]]))
    return 0


def watch(ray: JobSubmissionClient, job: str, address: str | None) -> int:
    """Prints a job's log until it ends; 0 if it has succeeded, else 1. Ctrl-C only ends the looking."""
    try:
        return asyncio.run(_follow(ray, job))
    except KeyboardInterrupt:
        print(
            f"\nsafedreamer: {job} goes on; look at it: {_command('logs', job, address)} --follow; "
            f"stop it: {_command('stop', job, address)}",
            file=sys.stderr,
        )
        return 130


async def _follow(ray: JobSubmissionClient, job: str) -> int:
    shown = 0  # characters; after a lost connection the log comes from its beginning
    while True:
        skip = shown
        try:
            async for text in ray.tail_job_logs(job):
                new, skip = text[skip:], max(0, skip - len(text))
                shown += len(new)
                print(new, end="", flush=True)
        except Exception as error:  # of the connection, or the log does not exist yet
            lost: Exception | None = error
        else:
            lost = None
        details = await asyncio.to_thread(_patiently, ray, job, lost)
        if details.status.is_terminal():
            print(_line(details), file=sys.stderr)
            return 0 if details.status == JobStatus.SUCCEEDED else 1
        await asyncio.sleep(_POLL_SECONDS)


def _patiently(ray: JobSubmissionClient, job: str, lost: Exception | None) -> JobDetails:
    """The job's state, also from a dashboard that is away for a moment."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return _details(ray, job)
        except requests.RequestException:
            if time.monotonic() > deadline:
                raise UserError(f"the dashboard does not answer any more ({lost}); {job} may go on") from None
        time.sleep(1)


def _details(ray: JobSubmissionClient, job: str) -> JobDetails:
    try:
        return ray.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error):
            _unknown(ray, job)
        raise


def _unknown(ray: JobSubmissionClient, job: str) -> NoReturn:
    known = [details.submission_id for details in ray.list_jobs() if details.submission_id]
    near = did_you_mean(job, known)
    raise UserError(f"there is no job {job}{near}; `safedreamer job list` shows all") from None


def _line(details: JobDetails) -> str:
    about: list[Any] = [details.submission_id or details.job_id, str(details.status)]
    if details.start_time:
        about.append(time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(details.start_time / 1000)))
    if details.metadata and RUN in details.metadata:
        about.append(f"run: {details.metadata[RUN]}")
    if details.status == JobStatus.FAILED and details.message:
        about.append(details.message.partition(", last available logs")[0])
    return "  ".join(about)


def _command(action: str, job: str, address: str | None) -> str:
    return f"safedreamer job {action} {job}" + (f" --address {address}" if address else "")
