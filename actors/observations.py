"""State observations of navigation tasks, read straight from the simulator by integer ids.

Both classes read what the last `mj_forward` left behind and never call it themselves:
`mj_forward` is not idempotent in MuJoCo 2.3.3, so an extra call would change the trajectory.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from actors.compat import mujoco
from actors.fast_env import Lookup

Slices = dict[str, tuple[int, int]]

_TWO_PI = 2 * np.pi
# Sensor -> the axes of it that coordinates observe.
_PICKS = {"velocimeter": (0, 1), "accelerometer": (0,), "gyro": (2,), "magnetometer": (0, 1, 2)}


class Observation(Protocol):
    """Reads one state vector; `bind` follows every reset, because a reset builds a new model."""

    size: int
    slices: Slices

    def bind(self) -> None: ...

    def read(self) -> np.ndarray: ...


class Sensors:
    """The robot's own sensor block, laid out as safety-gymnasium does.

    Hinge angles become (sin, cos) and ball quaternions rotation matrices; the height of a free
    joint keeps only z. `slices` names every sensor.
    """

    def __init__(self, task: Any):
        self._task = task
        self.slices: Slices = {}
        spaces = task.agent.build_sensor_observation_space()
        offset = 0
        for name, space in spaces.items():
            width = int(np.prod(space.shape))
            self.slices[name] = (offset, offset + width)
            offset += width
        self.size = offset

    def bind(self) -> None:
        model, info = self._task.model, self._task.agent.sensor_info
        self._data = self._task.data
        source: list[int] = []
        target: list[int] = []
        hinges, balls = [], []
        for name, (start, stop) in self.slices.items():
            address = int(model.sensor_adr[model.sensor(name).id])
            if name in info.hinge_pos_names:
                hinges.append((address, start))
            elif name in info.ballquat_names:
                balls.append((address, start))
            else:
                first = address + (2 if name == info.freejoint_pos_name else 0)
                source.extend(range(first, first + stop - start))
                target.extend(range(start, stop))
        self._source, self._target = np.array(source), np.array(target)
        self._hinge_source = np.array([a for a, _ in hinges], int)
        self._hinge_target = np.array([s for _, s in hinges], int)
        self._balls = balls

    def read(self, out: np.ndarray) -> None:
        """Fills `out` [size], float64."""
        values = self._data.sensordata
        out[self._target] = values[self._source]
        if len(self._hinge_source):
            angles = values[self._hinge_source]
            out[self._hinge_target] = np.sin(angles)
            out[self._hinge_target + 1] = np.cos(angles)
        for address, start in self._balls:
            mujoco.mju_quat2Mat(out[start : start + 9], values[address : address + 4])


class Lidar:
    """The task's own vector: sensors, then 16 lidar bins per kind of object.

    The same numbers as `safety_gymnasium` (its "pseudo" lidar with aliasing), up to the rounding of
    a vectorised matrix product (2e-16).
    """

    def __init__(self, task: Any, lookup: Lookup):
        self._task, self._lookup = task, lookup
        self._sensors = Sensors(task)
        self._bins = task.lidar_conf.num_bins
        self._range = float(task.lidar_conf.max_dist)
        self._kinds = [o for o in task._obstacles if o.is_lidar_observed]
        self.slices: Slices = dict(self._sensors.slices)
        offset = self._sensors.size
        for kind in self._kinds:
            self.slices[f"{kind.name}_lidar"] = (offset, offset + self._bins)
            offset += self._bins
        self.size = offset

    def bind(self) -> None:
        self._sensors.bind()
        bodies = self._lookup.refresh().bodies
        pairs = [(body, row) for row, kind in enumerate(self._kinds) for body in bodies[kind.name]]
        self._bodies = np.array([body for body, _ in pairs], int)
        self._rows = [row * self._bins for _, row in pairs]  # where the kind's bins start

    def read(self) -> np.ndarray:
        out = np.zeros(self.size)
        self._sensors.read(out[: self._sensors.size])
        out[self._sensors.size :] = self._scan()
        buttons = getattr(self._task, "buttons", None)
        if buttons is not None and buttons.timer != 0:  # just pressed: the task hides the buttons
            out[slice(*self.slices["buttons_lidar"])] = 0.0
        return out.astype(np.float32)

    def _scan(self) -> list[float]:
        lookup, bins = self._lookup, self._bins
        offsets = lookup.xpos[self._bodies]
        offsets[:, 2] = 0.0
        offsets -= lookup.xpos[lookup.agent]
        ego = offsets @ lookup.xmat[lookup.agent].reshape(3, 3)
        distance = np.hypot(ego[:, 0], ego[:, 1])
        angle = np.arctan2(ego[:, 1], ego[:, 0]) % _TWO_PI
        width = _TWO_PI / bins
        index = (angle / width).astype(int)
        share = (angle - width * index) / width
        near = np.maximum(0.0, self._range - distance) / self._range
        scan = [0.0] * (len(self._kinds) * bins)
        # A plain loop: faster than ufunc.at for at most ~30 objects.
        rows = zip(self._rows, index.tolist(), near.tolist(), share.tolist(), strict=True)
        for row, bin_, reading, alias in rows:
            for k, value in (
                (row + bin_, reading),
                (row + (bin_ + 1) % bins, alias * reading),
                (row + (bin_ - 1) % bins, (1 - alias) * reading),
            ):
                if value > scan[k]:
                    scan[k] = value
        return scan


class Coordinates:
    """Egocentric coordinates of a Goal task (ALGORITHM.md, section 4); 29 numbers for PointGoal1.

    velocimeter (x, y) | accelerometer x | gyro z | magnetometer (3) | goal (x, y) |
    hazards (x, y) each | vases (x, y) each | joints | rotation (2) | position (2)

    Positions are metres in the robot's horizontal heading frame (x ahead, y left), so that the
    length of a pair is the horizontal distance by which the task decides on costs, also for a
    robot that leans. `vases` is present where touching them costs (level 2), `hazards` from
    level 1. `rotation` is the start of the first row of the robot's rotation matrix (cos, -sin of
    the heading for an upright robot), `position` the robot's world (x, y). `joints`, for Car,
    Racecar and Ant, holds the rest of the robot's own sensors in the order of the lidar
    observation: accelerometer (y, z), velocimeter z, gyro (x, y), then the joints.
    """

    def __init__(self, task: Any, lookup: Lookup):
        self._task, self._lookup = task, lookup
        self._sensors = Sensors(task)
        kinds = [("goal", 1)]
        for name in ("hazards", "vases"):
            kind = getattr(task, name, None)
            if kind is not None and kind.is_constrained:
                kinds.append((name, kind.num))
        self._kinds = [name for name, _ in kinds]
        picked = self._picked_sensors()
        others = [i for i in range(self._sensors.size) if i not in picked]
        rest = [] if task.agent_name == "Point" else others
        widths = {name: len(_PICKS[name]) for name in _PICKS}
        widths |= {name: 2 * count for name, count in kinds}
        widths |= {"joints": len(rest)} if rest else {}
        widths |= {"rotation": 2, "position": 2}
        self.slices: Slices = {}
        offset = 0
        for name, width in widths.items():
            self.slices[name] = (offset, offset + width)
            offset += width
        self.size = offset
        self._picked, self._rest = np.array(picked), np.array(rest, int)
        self._sensor_buffer = np.zeros(self._sensors.size)

    def _picked_sensors(self) -> list[int]:
        return [self._sensors.slices[name][0] + i for name, axes in _PICKS.items() for i in axes]

    def bind(self) -> None:
        self._sensors.bind()
        bodies = self._lookup.refresh().bodies
        self._bodies = np.concatenate([bodies[name] for name in self._kinds])

    def read(self) -> np.ndarray:
        lookup = self._lookup
        self._sensors.read(self._sensor_buffer)
        rotation = lookup.xmat[lookup.agent]
        position = lookup.xpos[lookup.agent]
        # The heading is where the robot's x axis points on the ground.
        heading = np.arctan2(rotation[3], rotation[0])
        cos, sin = np.cos(heading), np.sin(heading)
        offset = lookup.xpos[self._bodies, :2] - position[:2]
        ego = offset @ np.array([[cos, -sin], [sin, cos]])
        parts = (
            self._sensor_buffer[self._picked],
            ego.ravel(),
            self._sensor_buffer[self._rest],
            rotation[:2],
            position[:2],
        )
        return np.concatenate(parts).astype(np.float32)
