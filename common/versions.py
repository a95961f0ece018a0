"""Which simulator and libraries a run, a checkpoint or a result was made with.

A score belongs to the MuJoCo that it was played on (docs/physics.md), so that runs, checkpoints and results
name theirs. A run that is resumed elsewhere has several: it keeps what it began with, and from where on it
went on with what.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.untrusted import is_count

MUJOCO = "mujoco"
PACKAGES = (MUJOCO, "safety-gymnasium", "jax")
_NAMES = ("python", *PACKAGES)
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,40}")
_MOST = 20  # stretches that are believed: a file may hold any number of them


@dataclass(frozen=True)
class Stretch:
    """A part of a training on one set of packages."""

    env_steps: int  # at which it began
    versions: Mapping[str, str]  # name -> version


def here() -> dict[str, str]:
    """What this process runs: name -> version, without what is not installed.

    Read from the packages' metadata, so that nobody imports a simulator for it.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def recorded(value: Any) -> list[Stretch]:
    """What a checkpoint says about its training; nothing where it says nothing or what none of ours would.

    Nobody is refused for it: agents are played all the same, and those of old checkpoints say nothing.
    """
    if not isinstance(value, list) or not all(map(_is_stretch, value[-_MOST:])):
        return []
    return [Stretch(entry["env_steps"], entry["versions"]) for entry in value[-_MOST:]]


def continued(before: Sequence[Stretch], env_steps: int) -> list[Stretch]:
    """A training that goes on here, with `env_steps` behind it."""
    now = here()
    if before and before[-1].versions == now:
        return list(before)
    return [*before, Stretch(env_steps, now)]


def as_json(stretches: Sequence[Stretch]) -> list[dict[str, Any]]:
    """What `recorded` reads."""
    return [asdict(stretch) for stretch in stretches]


def of_result(trained: Sequence[Stretch]) -> dict[str, Any]:
    """What a score names: what its agent has trained on, and what it was played on, here."""
    return {"trained_on": as_json(trained), "played_on": here()}


def other_physics(trained: Sequence[Stretch]) -> str | None:
    """A sentence for the user where an agent has trained on another MuJoCo than this process has."""
    known = [stretch.versions[MUJOCO] for stretch in trained if MUJOCO in stretch.versions]
    then, now = list(dict.fromkeys(known)), here().get(MUJOCO)
    if now is None or then in ([], [now]):
        return None
    return f"trained on MuJoCo {' and '.join(then)}, this is {now}: physics differ a little (docs/physics.md)"


def _is_stretch(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"env_steps", "versions"}:
        return False
    versions = entry["versions"]
    if not is_count(entry["env_steps"]) or not isinstance(versions, dict):
        return False
    return versions.keys() <= set(_NAMES) and all(
        isinstance(version, str) and _VERSION.fullmatch(version) for version in versions.values()
    )
