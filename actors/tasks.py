"""The tasks of Safety-Gymnasium 1.0.0 by their ids. Imports nothing heavy."""

from __future__ import annotations

import difflib
import re

from common.types import UserError

ROBOTS = ("Point", "Car", "Racecar", "Doggo", "Ant")
LEVELLED = ("Goal", "Button", "Push", "Circle")
VELOCITY_ROBOTS = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid")
COORDINATE_ROBOTS = ("Point", "Car", "Racecar", "Ant")
SHORT_EPISODES = ("Circle", "Run")
OBSERVATIONS = ("lidar", "coordinates", "vision", "vision+lidar", "vision+coordinates")
_BOTH_WAYS = ("vision", "vision_back")
CAMERAS = {  # robot -> its own cameras
    "Point": _BOTH_WAYS,
    "Car": _BOTH_WAYS,
    "Racecar": _BOTH_WAYS,
    "Doggo": ("vision",),
    "Ant": ("vision",),
}

# Simulated seconds of an env step in navigation tasks.
ENV_STEP_SECONDS = {"Point": 0.02, "Car": 0.04, "Racecar": 0.04, "Doggo": 0.1, "Ant": 0.1}

_NAVIGATION = re.compile(rf"Safety({'|'.join(ROBOTS)})({'|'.join(LEVELLED)}|Run)(\d)-v0")


def list_tasks() -> list[str]:
    """Ids of all navigation and velocity tasks."""
    kinds = [f"{kind}{level}" for kind in LEVELLED for level in range(3)] + ["Run0"]
    navigation = [f"Safety{robot}{kind}-v0" for kind in kinds for robot in ROBOTS]
    return navigation + [f"Safety{robot}Velocity-v1" for robot in VELOCITY_ROBOTS]


def check_task(task: str) -> None:
    """Raises `UserError` with the nearest valid ids if `task` is not one of `list_tasks()`."""
    known = list_tasks()
    if task in known:
        return
    near = difflib.get_close_matches(task, known, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"A valid one is {known[0]}."
    raise UserError(f"Unknown task {task!r}. {hint} `safedreamer list` shows all {len(known)}.")


def is_navigation(task: str) -> bool:
    """Whether `task` is a navigation task (the others are velocity tasks)."""
    return _NAVIGATION.fullmatch(task) is not None


def has_coordinates(task: str) -> bool:
    """Whether the `coordinates` observation exists for `task`."""
    match = _NAVIGATION.fullmatch(task)
    return match is not None and match[1] in COORDINATE_ROBOTS and match[2] == "Goal"


def time_limit(task: str) -> int:
    """Env steps after which an episode of `task` is truncated."""
    match = _NAVIGATION.fullmatch(task)
    return 500 if match is not None and match[2] in SHORT_EPISODES else 1000


def check_observation(task: str, observation: str) -> None:
    """Raises `UserError` if `task` does not exist or does not offer `observation`."""
    check_task(task)
    if observation not in OBSERVATIONS:
        near = difflib.get_close_matches(observation, OBSERVATIONS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"Unknown observation {observation!r}: choose one of {', '.join(OBSERVATIONS)}.{hint}"
        )
    if "coordinates" in sources(observation) and not has_coordinates(task):
        raise UserError(
            f"Task {task} has no coordinates observation: only Safety{{{','.join(COORDINATE_ROBOTS)}}}"
            f"Goal{{0,1,2}}-v0 have it. Use --env.observation {observation.replace('coordinates', 'lidar')} "
            "and a method that learns costs."
        )
    if "vision" in sources(observation) and not is_navigation(task):
        raise UserError(
            f"Task {task} has no vision observation: the robots of velocity tasks carry no cameras. "
            "Use --env.observation lidar."
        )


def sources(observation: str) -> list[str]:
    """What an observation is made of: lidar or coordinates, vision, or vision and one of them."""
    return observation.split("+")


def cameras(task: str, observation: str, names: str = "auto") -> tuple[str, ...]:
    """The cameras of a checked observation, in the order of its images; none without vision.

    Args:
        names: comma-separated; "auto" stands for all that the robot has.

    Raises:
        UserError: a camera that the robot does not have (with the nearest one), is named twice, or is
            named for an observation without vision.
    """
    match = _NAVIGATION.fullmatch(task)
    if match is None or "vision" not in sources(observation):
        if names != "auto":
            raise UserError(
                f"The {observation} observation of {task} uses no cameras, but {names!r} are given: "
                "choose one with vision, or leave --env.cameras out."
            )
        return ()
    known = CAMERAS[match[1]]
    if names == "auto":
        return known
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(
                f"{match[1]} has no camera {name!r}. Did you mean {near[0]}? It has: {', '.join(known)}."
            )
        if chosen.count(name) > 1:
            raise UserError(f"Camera {name} is named more than once in {names!r}.")
    return chosen
