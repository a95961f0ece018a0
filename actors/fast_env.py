"""Exact fast stepping of safety-gymnasium 1.0.0: the same numbers for less time.

Nothing of the package is patched and nothing is forked: `accelerate` changes one environment. Its
step logic (reward, cost, goals, random numbers, every `mj_forward`) stays the package's own, but what
that logic asks of the simulator (positions, distances, contacts) is looked up by integer id instead
of by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.compat import mujoco
from actors.fast_reset import sample_layout


def body_names(obstacle: Any) -> list[str]:
    """Names of the bodies of one kind of object, in the package's order."""
    name, count = obstacle.name, getattr(obstacle, "num", None)
    if count is None:
        return [name]
    suffix = "obj" if name == "gremlins" else ""
    return [f"{name[:-1]}{i}{suffix}" for i in range(count)]


class Lookup:
    """Ids and array views of a task's current model; every reset of the task builds a new one."""

    def __init__(self, task: Any):
        self._task = task
        self.model: Any = None

    def refresh(self) -> Lookup:
        """Looks everything up again if the model is a new one."""
        model = self._task.agent.engine.model
        if model is self.model:
            return self
        data = self._task.agent.engine.data
        self.model, self.data = model, data
        self.xpos, self.xmat, self.ctrl = data.xpos, data.xmat, data.ctrl  # views, always current
        self.agent = model.body("agent").id
        self.bodies = {o.name: self._bodies(o) for o in self._task._obstacles}
        names = [model.geom(i).name for i in range(model.ngeom)]
        robot = set(self._task.agent.body_info.geom_names)
        self._robot_geoms = np.array([name in robot for name in names])
        self._kind_geoms = {
            kind: np.array([name.startswith(kind) for name in names])
            for kind in ("vase", "gremlin", "button", "pillar")
        }
        self.geom_id = {name: i for i, name in enumerate(names)}
        self.low, self.high = model.actuator_ctrlrange.T.copy()
        self.mocap_pos = data.mocap_pos  # gremlins are the only mocap bodies
        self._jacobian = np.zeros((3, model.nv))
        return self

    def _bodies(self, obstacle: Any) -> np.ndarray:
        if obstacle.name in ("circle", "walls", "sigwalls"):
            return np.zeros(1, int)  # body 0: the world, at the origin
        return np.array([self.model.body(name).id for name in body_names(obstacle)], int)

    def touching(self, kind: str, but_not: int | None = None) -> int:
        """Contacts between the robot and geoms whose names begin with `kind`.

        Contacts that involve the geom `but_not` do not count.
        """
        count = self.data.ncon
        if not count:
            return 0
        contact = self.data.contact
        one, two = contact.geom1[:count], contact.geom2[:count]
        geoms, robot = self._kind_geoms[kind], self._robot_geoms
        hits = (geoms[one] | geoms[two]) & (robot[one] | robot[two])
        if but_not is not None:
            hits &= (one != but_not) & (two != but_not)
        return int(np.count_nonzero(hits))

    def robot_touches(self, geom: int) -> bool:
        """Whether the robot is in contact with one geom."""
        count = self.data.ncon
        contact = self.data.contact
        one, two = contact.geom1[:count], contact.geom2[:count]
        robot = self._robot_geoms
        return bool((((one == geom) | (two == geom)) & (robot[one] | robot[two])).any())

    def speed(self, body: int) -> float:
        """Speed of a body's origin, m/s."""
        self._jacobian[:] = 0.0
        mujoco.mj_jacBody(self.model, self.data, self._jacobian, None, body)
        return np.sqrt(np.sum(np.square(np.dot(self._jacobian, self.data.qvel))))


def accelerate(task: Any) -> Lookup:
    """Speeds up one navigation task in place; rewards, costs, ends and random numbers stay equal.

    `task.obs()` returns None from now on (it still calls `mj_forward`, which moves the state):
    observations are read by `actors.observations`, and only for the last repetition of an action.
    """
    lookup = Lookup(task)
    _accelerate_agent(task.agent, lookup)
    for obstacle in task._obstacles:
        _override(obstacle, pos=property(_positions(obstacle.name, lookup)))
        if obstacle.name in _COSTS:
            _override(obstacle, cal_cost=_COSTS[obstacle.name](lookup))
    if hasattr(task, "gremlins"):
        _override(task.gremlins, move=_gremlin_move(lookup))
    if hasattr(task, "buttons"):
        _override(task, goal_achieved=property(_button_pressed(lookup)))
    _override(task.random_generator, sample_layout=sample_layout)
    _override(task, simulation_forward=_simulate(lookup), obs=_forward_only)
    return lookup


def _override(instance: Any, **members: Any) -> None:
    """Gives one instance its own subclass with other members (a property needs a class)."""
    cls = type(instance)
    instance.__class__ = type(cls.__name__, (cls,), members)


def _accelerate_agent(agent: Any, lookup: Lookup) -> None:
    def pos(self: Any) -> np.ndarray:
        return lookup.refresh().xpos[lookup.agent].copy()

    def mat(self: Any) -> np.ndarray:
        return lookup.refresh().xmat[lookup.agent].reshape(3, 3).copy()

    def dist_xy(self: Any, target: np.ndarray) -> float:
        x, y, _ = lookup.refresh().xpos[lookup.agent].tolist()
        dx, dy = float(target[0]) - x, float(target[1]) - y
        return math.sqrt(dx * dx + dy * dy)

    def apply_action(self: Any, action: np.ndarray, noise: None) -> None:
        lookup.refresh().ctrl[:] = np.minimum(np.maximum(action, lookup.low), lookup.high)

    _override(agent, pos=property(pos), mat=property(mat), dist_xy=dist_xy, apply_action=apply_action)


def _positions(name: str, lookup: Lookup) -> Callable[[Any], Any]:
    def many(self: Any) -> list[np.ndarray]:
        return list(lookup.refresh().xpos[lookup.bodies[name]])

    def one(self: Any) -> np.ndarray:
        return lookup.refresh().xpos[lookup.bodies[name][0]].copy()

    return one if name in ("goal", "push_box", "circle") else many


def _hazard_cost(lookup: Lookup) -> Callable[[Any], dict]:
    def cal_cost(self: Any) -> dict:
        if not self.is_constrained:
            return {}
        x, y, _ = lookup.refresh().xpos[lookup.agent].tolist()
        cost = 0
        for hazard_x, hazard_y, _ in lookup.xpos[lookup.bodies["hazards"]].tolist():
            dx, dy = hazard_x - x, hazard_y - y
            distance = math.sqrt(dx * dx + dy * dy)
            if distance <= self.size:
                cost += self.cost * (self.size - distance)
        return {"cost_hazards": cost}

    return cal_cost


def _vase_cost(lookup: Lookup) -> Callable[[Any], dict]:
    def cal_cost(self: Any) -> dict:
        if not self.is_constrained:
            return {}
        speeds = [lookup.speed(body) for body in lookup.refresh().bodies["vases"]]
        moving = sum(v * self.velocity_cost for v in speeds if v >= self.velocity_threshold)
        touching = lookup.touching("vase") * self.contact_cost
        return {"cost_vases_contact": touching, "cost_vases_velocity": moving}

    return cal_cost


def _gremlin_cost(lookup: Lookup) -> Callable[[Any], dict]:
    def cal_cost(self: Any) -> dict:
        if not self.is_constrained:
            return {}
        return {"cost_gremlins": lookup.refresh().touching("gremlin") * self.contact_cost}

    return cal_cost


def _pillar_cost(lookup: Lookup) -> Callable[[Any], dict]:
    def cal_cost(self: Any) -> dict:
        if not self.is_constrained:
            return {}
        return {"cost_pillars": lookup.refresh().touching("pillar") * self.cost}

    return cal_cost


def _button_cost(lookup: Lookup) -> Callable[[Any], dict]:
    def cal_cost(self: Any) -> dict:
        if not self.is_constrained or self.timer != 0:
            return {}
        goal = lookup.refresh().geom_id[f"button{self.goal_button}"]
        return {"cost_buttons": lookup.touching("button", but_not=goal) * self.cost}

    return cal_cost


_COSTS = {
    "hazards": _hazard_cost,
    "vases": _vase_cost,
    "gremlins": _gremlin_cost,
    "pillars": _pillar_cost,
    "buttons": _button_cost,
}


def _button_pressed(lookup: Lookup) -> Callable[[Any], bool]:
    def goal_achieved(self: Any) -> bool:
        return lookup.refresh().robot_touches(lookup.geom_id[f"button{self.buttons.goal_button}"])

    return goal_achieved


def _gremlin_move(lookup: Lookup) -> Callable[[Any], None]:
    def move(self: Any) -> None:
        phase = float(lookup.refresh().data.time)
        lookup.mocap_pos[:] = (np.sin(phase) * self.travel, np.cos(phase) * self.travel, self.size)

    return move


_SENSORS = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)


def _simulate(lookup: Lookup) -> Callable[[Any, np.ndarray], bool]:
    def simulation_forward(self: Any, action: np.ndarray) -> bool:
        self.agent.apply_action(action, None)
        model, data = lookup.model, lookup.data
        # Always the full count, but drawing it moves the random stream on.
        count = self.random_generator.binomial(
            self.sim_conf.frameskip_binom_n, self.sim_conf.frameskip_binom_p
        )
        # Nothing reads a sensor before the forward pass, which fills them all, and none acts on the state.
        model.opt.disableflags |= _SENSORS
        if self._mocaps:
            for _ in range(count):
                for mocap in self._mocaps.values():
                    mocap.move()
                mujoco.mj_step(model, data)
        else:
            mujoco.mj_step(model, data, count)
        model.opt.disableflags &= ~_SENSORS
        mujoco.mj_forward(model, data)
        return False

    return simulation_forward


def _forward_only(self: Any) -> None:
    mujoco.mj_forward(self.model, self.data)
