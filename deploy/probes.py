"""Checks of what may hang or crash: jax, Reverb, Ray, OpenGL. Each in a process of its own, bounded in time.

Part of `safedreamer doctor`; importing this module imports none of them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors import rendering as gl
from deploy.stack import stack
from replay.backend import exists as reverb_exists

ROOT = Path(__file__).resolve().parent.parent

# Runs the code it gets and prints, last of all, the dict `facts` that the code made, or its error.
_HARNESS = """
import json, os, sys, traceback
scope = {}
try:
    exec(sys.argv[1], scope)
    answer = {"facts": scope["facts"]}
except BaseException as error:
    answer = {"error": traceback.format_exception_only(error)[-1].strip()}
print(json.dumps(answer), flush=True)
os._exit(0)  # libraries that fail while they unload have done their work
"""
_JAX = """
import jax
jax.numpy.ones((8, 8)).sum().block_until_ready()
kinds = [device.device_kind for device in jax.devices()]
facts = {"version": jax.__version__, "backend": jax.default_backend(), "kinds": kinds}
"""
_REVERB = """
import resource, sys
from replay.backend import load
load(sys.argv[2])
facts = {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
"""
_PORT = """
from common.types import UserError
from replay import binding
facts = {"refused": ""}
try:
    binding.rehearse()
except UserError as error:
    facts["refused"] = str(error)
"""
_RAY = """
import os, sys, time, ray, ray._common.utils
start = time.monotonic()
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=10**8, log_to_driver=False,
         logging_level="error", _node_ip_address="127.0.0.1", _temp_dir=sys.argv[2])
assert ray.get(ray.remote(lambda: 42).remote(), timeout=60) == 42
ray.shutdown()
place = ray._common.utils.get_ray_temp_dir()  # of a training; made now, it would be nobody else's
there = place if os.path.isdir(place) else os.path.dirname(place)
facts = {"version": ray.__version__, "seconds": time.monotonic() - start, "place": place,
         "writable": os.access(there, os.W_OK | os.X_OK)}
"""
_RENDERING = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom size=".3"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
image = renderer.render()
facts = {"contrast": int(image.max()) - int(image.min())}
"""


@dataclass(frozen=True)
class Check:
    """One line of the report; `fail` means that training can not work."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""


def probe(
    code: str, argument: str = "", *, seconds: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """Runs Python code that leaves its findings in a dict `facts`; `sys.argv[2]` is the argument.

    Returns (facts, ""), or ({}, why there are none) after an error, a crash or `seconds`.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _HARNESS, code, argument],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {}, f"no answer within {seconds:.0f} s"
        finally:  # Ray's own processes end with the one that started them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode < 0:
        return {}, f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode > 0 or not output.strip():
        return {}, f"ended with exit code {process.returncode}"
    answer = json.loads(output.splitlines()[-1])
    return answer.get("facts", {}), answer.get("error", "")


def accelerator(name: str) -> Check:
    """The devices that jax computes on, against the CUDA cards of the machine."""
    facts, why = probe(_JAX, seconds=90, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    if why:
        return Check(name, "fail", f"jax does not work: {why}", "run `make setup`")
    detail = f"jax {facts['version']} on {facts['backend']}: {', '.join(facts['kinds'])}"
    cards = cuda_cards()
    if facts["backend"] != "cpu" or not cards:
        return Check(name, "ok", detail)
    platforms = os.environ.get("JAX_PLATFORMS")
    hint = f"unset JAX_PLATFORMS, which is {platforms!r}" if platforms else "run `make setup CUDA=1`"
    return Check(name, "warn", f"{detail}; not used: {', '.join(cards)}", hint)


def cuda_cards() -> list[str]:
    """Names of the cards that the NVIDIA driver sees."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def reverb(name: str) -> Check:
    """Imports Reverb without TensorFlow's Python, or else with it; newer Pythons replay without it."""
    if stack() == "modern":
        version = ".".join(map(str, sys.version_info[:2]))
        return Check(name, "ok", f"replay in memory: there is no Reverb for Python {version}")
    try:
        version = importlib.metadata.version("dm-reverb")
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "dm-reverb is not installed", "run `make setup`")
    facts, why = probe(_REVERB, "lite", seconds=60)
    if not why:
        return Check(name, "ok", f"dm-reverb {version}, {facts['mb']:.0f} MB")
    _, full = probe(_REVERB, "full", seconds=120)
    if full:
        return Check(name, "fail", f"dm-reverb {version} does not import: {full}", "run `make setup`")
    detail = f"dm-reverb {version} imports only with all of TensorFlow: {why}"
    return Check(name, "warn", detail, "train with --replay.import-mode full")


def port(name: str) -> Check:
    """Whether this user can keep Reverb's port to this machine."""
    if not reverb_exists():
        return Check(name, "ok", "replay in memory opens no port")
    facts, why = probe(_PORT, seconds=30)
    if why:
        return Check(name, "fail", f"whether one can be kept cannot be tried: {why}", "run `make setup`")
    if not facts["refused"]:
        return Check(name, "ok", "can be kept to 127.0.0.1 by this user")
    detail, _, hint = facts["refused"].partition(": ")
    return Check(name, "fail", detail, hint)


def ray(name: str) -> Check:
    """Starts a small Ray of its own, runs one task, stops it."""
    folder = tempfile.mkdtemp(prefix="doctor-")  # short: paths of sockets have at most 107 characters
    try:
        facts, why = probe(_RAY, folder, seconds=120, env={"RAY_USAGE_STATS_ENABLED": "0"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if why:
        return Check(name, "fail", f"does not start: {why}", "free memory, or train with --backend inline")
    if not facts["writable"]:
        hint = "set RAY_TMPDIR to a folder of your own with a short path, or train with --backend inline"
        return Check(name, "fail", f"this user cannot write in {facts['place']}", hint)
    return Check(name, "ok", f"ray {facts['version']}, started and stopped in {facts['seconds']:.0f} s")


def rendering(name: str) -> Check:
    """Renders a picture without a screen, by the first backend of this system that can."""
    reasons = []
    for backend in gl.backends():
        env = {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
        facts, why = probe(_RENDERING, seconds=60, env=env)
        if not why and facts["contrast"] > 0:
            return Check(name, "ok", f"MUJOCO_GL={backend}")
        reasons.append(f"{backend}: {why or 'an empty picture'}")
    detail = f"no videos, no camera observations ({'; '.join(reasons) or 'only Linux and macOS can'})"
    lost = gl.missing_packages()
    hint = f"Debian, Ubuntu: apt-get install {' '.join(lost)}" if lost else "is the graphics driver complete?"
    return Check(name, "warn", detail, hint)
