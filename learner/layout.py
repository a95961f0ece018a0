"""How a scene is read out of a state observation: from positions, or from a lidar (**ours**).

A layout is hashable, so that compiled functions may depend on it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.types import EnvSpec, SceneSpec
from learner.geometry import distance, heading_of, relative_motion, rotate
from learner.layers import symlog

Slice = tuple[int, int]  # (start, stop) in the state observation, from `EnvSpec.slices`

_POSES = ("position", "rotation", "magnetometer")  # where the robot is in the world
_TARGETS = ("buttons",)  # kinds of objects of which one is the goal
_TINY = 1e-6


class Layout(Protocol):
    """What a scene needs to know of an observation; positions are egocentric (x ahead, y left; m)."""

    @property
    def task(self) -> SceneSpec: ...

    @property
    def sensors(self) -> tuple[Slice, ...]:
        """Of the robot itself, whatever is around it and wherever it is."""
        ...

    @property
    def objects(self) -> int:
        """Obstacles in a scene."""
        ...

    @property
    def hazards(self) -> int:
        """How many of them, the first ones, are hazards as the observation lists them."""
        ...

    @property
    def shown(self) -> int:
        """How many of them, the nearest, actor and critics see."""
        ...

    def goal_of(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n 2"]: ...

    def obstacles_of(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n objects 2"]: ...

    def motion(
        self, vector: Float[Array, "*n T O"]
    ) -> tuple[Float[Array, "*n T-1 2"], Float[Array, "*n T-1"]]:
        """By how much the robot moved (m, in its frame before) and turned (rad) from step to step."""
        ...


def layout_of(spec: EnvSpec) -> Layout:
    """Raises KeyError where the observation lacks what makes a scene."""
    if spec.scene is None:
        raise KeyError("goal")
    at = spec.slices
    kinds = {"goal", *spec.scene.obstacles, "vases"}  # vases are seen where they do not cost, too
    others = {*kinds, *_POSES}
    sensors = tuple(at[name] for name in at if name not in others and not name.endswith("_lidar"))
    if "goal_lidar" in at:
        obstacles = tuple(at[f"{name}_lidar"] for name in spec.scene.obstacles if name not in _TARGETS)
        targets = tuple(at[f"{name}_lidar"] for name in spec.scene.obstacles if name in _TARGETS)
        velocity = (at["velocimeter"][0], at["velocimeter"][0] + 2)
        compass = (at["magnetometer"][0], at["magnetometer"][0] + 2)
        return Lidar(spec.scene, sensors, at["goal_lidar"], obstacles, targets, velocity, compass)
    obstacles = tuple(at[name] for name in spec.scene.obstacles)
    return Positions(spec.scene, sensors, at["goal"], obstacles, at["position"], at["rotation"])


def body_of(layout: Layout, vector: Float[Array, "*n O"]) -> Float[Array, "*n b"]:
    """symlog of the robot's own sensors."""
    return symlog(jnp.concatenate([_take(vector, sensor) for sensor in layout.sensors], -1))


class Positions(NamedTuple):
    """Observed positions of all objects and of the robot (observation coordinates)."""

    task: SceneSpec
    sensors: tuple[Slice, ...]
    goal: Slice
    obstacles: tuple[Slice, ...]  # one for each kind, hazards first
    position: Slice
    rotation: Slice

    @property
    def objects(self) -> int:
        return sum(stop - start for start, stop in self.obstacles) // 2

    @property
    def hazards(self) -> int:
        return (self.obstacles[0][1] - self.obstacles[0][0]) // 2 if self.obstacles else 0

    @property
    def shown(self) -> int:
        return min(4, self.objects)

    def goal_of(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n 2"]:
        return _take(vector, self.goal)

    def obstacles_of(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n objects 2"]:
        numbers = jnp.concatenate([vector[..., :0], *(_take(vector, kind) for kind in self.obstacles)], -1)
        return numbers.reshape(*numbers.shape[:-1], self.objects, 2)

    def motion(
        self, vector: Float[Array, "*n T O"]
    ) -> tuple[Float[Array, "*n T-1 2"], Float[Array, "*n T-1"]]:
        return relative_motion(_take(vector, self.position), _take(vector, self.rotation))


class Lidar(NamedTuple):
    """Bins of nearness around the robot, one lidar for each kind of object.

    Every bin counts as an object, see `echoes`. The robot's turns come from its magnetometer, its
    displacement from the mean of its velocities before and after: for a Point within 2 %.
    """

    task: SceneSpec
    sensors: tuple[Slice, ...]
    goal: Slice
    obstacles: tuple[Slice, ...]
    targets: tuple[Slice, ...]  # kinds that cost, too, but for the one of them that is the goal: buttons
    velocity: Slice
    compass: Slice

    @property
    def objects(self) -> int:
        return sum(stop - start for start, stop in self.obstacles + self.targets)

    @property
    def hazards(self) -> int:
        return 0

    @property
    def shown(self) -> int:
        return min(8, self.objects)

    def goal_of(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n 2"]:
        nearness = _take(vector, self.goal)
        places = echoes(nearness, self.task.lidar_range)
        return jnp.take_along_axis(places, nearness.argmax(-1)[..., None, None], -2)[..., 0, :]

    def obstacles_of(self, vector: Float[Array, "*n O"]) -> Float[Array, "*n objects 2"]:
        kinds = [echoes(_take(vector, kind), self.task.lidar_range) for kind in self.obstacles]
        goal = self.goal_of(vector)[..., None, :]
        for kind in self.targets:
            places = echoes(_take(vector, kind), self.task.lidar_range)
            is_goal = distance(places - goal) < 2 * self.task.radius
            kinds.append(jnp.where(is_goal[..., None], self.task.lidar_range, places))
        return jnp.concatenate([jnp.zeros((*vector.shape[:-1], 0, 2)), *kinds], -2)

    def motion(
        self, vector: Float[Array, "*n T O"]
    ) -> tuple[Float[Array, "*n T-1 2"], Float[Array, "*n T-1"]]:
        compass, velocity = _take(vector, self.compass), _take(vector, self.velocity)
        bearing = jnp.arctan2(compass[..., 1], compass[..., 0])
        turn = bearing[..., :-1] - bearing[..., 1:]  # what stands still turns the other way
        turn = (turn + jnp.pi) % (2 * jnp.pi) - jnp.pi
        mean = (velocity[..., :-1, :] + rotate(velocity[..., 1:, :], heading_of(turn))) / 2
        return self.task.step_seconds * mean, turn


def echoes(nearness: Float[Array, "*n bins"], reach: float) -> Float[Array, "*n bins 2"]:
    """One place (m) for every bin of a lidar with aliasing.

    An object in bin i, a share s of the bin's width from its start, at distance d, reads 1 - d / reach there,
    s times that in bin i + 1 and 1 - s times that in bin i - 1; of several objects a bin shows the largest
    reading. Thus s = 1/2 + (r[i+1] - r[i-1]) / (2 r[i]): right for an object by itself, within the bin for
    all. The fainter readings beside an object become places behind it, towards its side of their bins.
    """
    bins = nearness.shape[-1]
    beside = jnp.roll(nearness, -1, -1) - jnp.roll(nearness, 1, -1)
    share = jnp.clip(0.5 + beside / (2 * nearness + _TINY), 0.0, 1.0)
    angle = (jnp.arange(bins) + share) * (2 * jnp.pi / bins)
    return (reach * (1 - nearness))[..., None] * heading_of(angle)


def _take(vector: Float[Array, "*n O"], part: Slice) -> Float[Array, "*n k"]:
    return jax.lax.slice_in_dim(vector, *part, axis=-1)
