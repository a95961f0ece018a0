"""Environments against the untouched package with a plain loop as action repeat: CPU time per env step.

One sample is a reset and the episode after it, 1,000 env steps. Both get the same seed and the same actions,
in turns, so that they simulate the same episode (`tests/actors/test_equality.py` shows that they do).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from actors import rendering
from actors.compat import safety_gymnasium
from actors.safety_gym import make_env
from common import versions
from tests.benchmarks.measure import Row, clock

REPEAT = 5
EPISODES = 3
# How many times cheaper than the package, on MuJoCo 2 and on MuJoCo 3. Its resets are most of what it costs:
# 1.2 s on MuJoCo 2.3.3, which decodes the sky's pictures every time, and 0.3 s on 3.17, which keeps them.
TARGETS = {
    "SafetyPointGoal1-v0": (9, 4),
    "SafetyCarGoal1-v0": (5, 2.5),
    "SafetyPointButton1-v0": (6, 5),
    "SafetyPointPush1-v0": (4, 2),
    "SafetyRacecarGoal1-v0": (3, 1.5),
    "SafetyAntGoal1-v0": (20, 4),
}
FRAME_TARGET = 2
FRAME_ROBOTS = ("Point", "Car", "Racecar", "Ant", "Doggo")


def run() -> Iterator[Row]:
    """Ratios per task, then of one camera frame per robot where there is OpenGL."""
    for task, (old, new) in TARGETS.items():
        yield from _episodes(task, old if versions.here()[versions.MUJOCO].startswith("2.") else new)
    if rendering.gl_backend() is not None:
        for robot in FRAME_ROBOTS:
            yield _frames(f"Safety{robot}Goal1-v0")


def _episodes(task: str, target: float) -> Iterator[Row]:
    ours, theirs = make_env(task, "lidar", REPEAT), _package(task)
    actions = np.random.default_rng(0).uniform(-1, 1, (1000, ours.spec.action_size)).astype(np.float32)
    samples = []
    for seed in range(EPISODES + 1):
        steps = {}

        def our_episode(seed: int = seed, steps: dict[str, int] = steps) -> None:
            ours.reset(seed)
            steps["ours"] = 0
            for action in actions:
                outcome = ours.step(action)
                steps["ours"] += outcome.env_steps
                if outcome.terminated or outcome.truncated:
                    break

        def their_episode(seed: int = seed, steps: dict[str, int] = steps) -> None:
            theirs.reset(seed=seed)
            steps["theirs"] = _play(theirs, actions)

        cpu_ours, cpu_theirs = clock(our_episode).cpu, clock(their_episode).cpu
        assert steps["ours"] == steps["theirs"], "not the same episode"
        samples.append((cpu_ours / steps["ours"], cpu_theirs / steps["theirs"]))
    samples = samples[1:]  # first calls load and compile
    ours.close()
    theirs.close()
    ratio = median(theirs / ours for ours, theirs in samples)
    mine, package = (1e6 * median(sample[i] for sample in samples) for i in (0, 1))
    note = f"{mine:.0f} against {package:.0f} us of CPU per env step"
    yield Row("environment", task, ratio, "x", f">= {target}", note)


def _play(env: Any, actions: np.ndarray) -> int:
    low, high = env.action_space.low.astype(np.float64), env.action_space.high.astype(np.float64)
    steps = 0
    for action in actions:
        scaled = (high + low) / 2 + action.astype(np.float64) * (high - low) / 2
        for _ in range(REPEAT):
            _, _, _, terminated, truncated, _ = env.step(scaled)
            steps += 1
            if terminated or truncated:
                return steps
    return steps


def _frames(task: str, count: int = 60) -> Row:
    """One front frame of 64 x 64 pixels; the package's own has markers of the lidar, ours has none."""
    ours = make_env(task, "vision", REPEAT, cameras="vision")
    theirs = _package(task, render_mode="rgb_array", camera_name="vision", width=64, height=64).unwrapped
    ours.reset(0)
    theirs.reset(seed=0)
    high = theirs.action_space.high
    pairs = []
    for i in range(count + 1):
        action = np.random.default_rng(i).uniform(-1, 1, ours.spec.action_size)
        outcome = ours.step(action)
        theirs.step(action * high)
        mine = clock(ours._sim.observe)
        package = clock(theirs.render)
        pairs.append((mine.cpu, package.cpu))
        if outcome.terminated:
            ours.reset(i)
            theirs.reset(seed=i)
    pairs = pairs[1:]
    ours.close()
    for viewer in theirs.task._viewers.values():  # the package leaves them to the interpreter's exit
        viewer.con.free()
        viewer.free()
    mine, package = (1e3 * median(pair[i] for pair in pairs) for i in (0, 1))
    note = f"{mine:.2f} against {package:.2f} ms of CPU per frame"
    return Row("environment", f"{task} frame", package / mine, "x", f">= {FRAME_TARGET}", note)


def _package(task: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return safety_gymnasium().make(task, disable_env_checker=True, **options)
