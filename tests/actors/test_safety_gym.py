import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from actors import tasks
from actors.compat import mujoco, safety_gymnasium
from actors.safety_gym import env_spec, make_env
from common.types import VECTOR, SceneSpec, UserError


def rollout(env, actions, seed=None):
    obs = [env.reset(seed)[VECTOR]]
    outcomes = [env.step(action) for action in actions]
    return np.stack(obs + [o.obs[VECTOR] for o in outcomes]), [o[1:] for o in outcomes]


def test_import_is_silent_and_the_task_list_is_light():
    heavy = "import actors.safety_gym as s; s.make_env('SafetyPointGoal1-v0', 'lidar', 1, 0).reset()"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    light = (
        "import sys, actors.tasks, actors.rendering; actors.tasks.list_tasks();"
        "sys.exit(any(name in sys.modules for name in ('mujoco', 'gymnasium')))"
    )
    assert subprocess.run([sys.executable, "-c", light], timeout=60).returncode == 0


def test_every_listed_task_is_registered_with_our_time_limit():
    safety_gymnasium()
    from gymnasium.envs.registration import registry

    listed = tasks.list_tasks()
    assert len(listed) == len(set(listed)) == 5 * (4 * 3 + 1) + 6
    for task in listed:
        assert registry[task].max_episode_steps == tasks.time_limit(task)


@pytest.mark.parametrize(
    ("task", "near"),
    [("SafetyPointGaol1-v0", "SafetyPointGoal1-v0"), ("SafetyAntVelocity-v0", "SafetyAntVelocity-v1")],
)
def test_unknown_task_names_the_nearest(task, near):
    with pytest.raises(UserError, match=near):
        make_env(task, "lidar", 1)


@pytest.mark.parametrize("task", ["SafetyPointPush1-v0", "SafetyDoggoGoal1-v0", "SafetyAntVelocity-v1"])
def test_coordinates_are_refused_where_they_do_not_exist(task):
    with pytest.raises(UserError, match="Point,Car,Racecar,Ant"):
        make_env(task, "coordinates", 1)


def test_unknown_observation():
    with pytest.raises(UserError, match=r"choose one of lidar, coordinates, vision"):
        make_env("SafetyPointGoal1-v0", "pixels", 1)


def test_coordinates_spec_of_point_goal_1():
    spec = env_spec("SafetyPointGoal1-v0", "coordinates", 5)
    assert spec.obs[VECTOR].shape == (29,)
    assert (spec.action_size, spec.action_repeat, spec.time_limit) == (2, 5, 1000)
    assert dict(spec.slices) == {
        "velocimeter": (0, 2),
        "accelerometer": (2, 3),
        "gyro": (3, 4),
        "magnetometer": (4, 7),
        "goal": (7, 9),
        "hazards": (9, 25),
        "rotation": (25, 27),
        "position": (27, 29),
    }


@pytest.mark.parametrize(
    ("task", "widths"),
    [
        ("SafetyPointGoal0-v0", {"goal": 2}),
        ("SafetyPointGoal2-v0", {"goal": 2, "hazards": 20, "vases": 20}),
        ("SafetyRacecarGoal1-v0", {"goal": 2, "hazards": 16, "joints": 5}),
        ("SafetyCarGoal1-v0", {"goal": 2, "hazards": 16, "joints": 5 + 12}),
        ("SafetyAntGoal1-v0", {"goal": 2, "hazards": 16, "joints": 5 + 28}),
    ],
)
def test_coordinates_spec_of_other_goal_tasks(task, widths):
    spec = env_spec(task, "coordinates", 1)
    sensors = {"velocimeter": 2, "accelerometer": 1, "gyro": 1, "magnetometer": 3}
    expected = {**sensors, **widths, "rotation": 2, "position": 2}
    assert {name: stop - start for name, (start, stop) in spec.slices.items()} == expected
    assert list(spec.slices) == list(expected)
    assert spec.obs[VECTOR].shape == (sum(expected.values()),)
    extent = {"0": 1.0, "1": 1.5, "2": 2.0}[task.removesuffix("-v0")[-1]]
    obstacles = tuple(name for name in ("hazards", "vases") if name in widths)
    for observation, repeat in (("coordinates", 1), ("lidar", 5)):
        scene = env_spec(task, observation, repeat).scene
        assert scene is not None
        assert scene.step_seconds > 0
        assert scene == SceneSpec(0.3, 1.0, 1.0, extent, obstacles, 3.0, scene.step_seconds)


def test_scenes_of_buttons_and_of_tasks_without_a_goal():
    scene = env_spec("SafetyPointButton1-v0", "lidar", 5).scene
    assert scene is not None
    assert (scene.radius, scene.obstacles) == (0.2, ("buttons", "hazards", "gremlins"))
    for task, observation in (
        ("SafetyPointPush1-v0", "lidar"),
        ("SafetyPointCircle1-v0", "lidar"),
        ("SafetyHopperVelocity-v1", "lidar"),
    ):
        assert env_spec(task, observation, 5).scene is None


@pytest.mark.parametrize("robot", tasks.ROBOTS)
def test_an_agent_step_takes_as_long_as_the_scene_says(robot):
    env = make_env(f"Safety{robot}Goal1-v0", "lidar", 2, seed=0)
    env.reset()
    sim: Any = env._sim
    before = sim._task.data.time
    env.step(np.zeros(env.spec.action_size))
    assert env.spec.scene is not None
    assert sim._task.data.time - before == pytest.approx(env.spec.scene.step_seconds)


def test_objects_appear_at_the_right_egocentric_coordinates():
    env = make_env("SafetyPointGoal1-v0", "coordinates", 1, seed=0)
    env.reset()
    sim: Any = env._sim
    model, data = sim._task.model, sim._task.data
    # The robot stands at (1, 2) and faces north (+y); its left is west (-x).
    model.body("agent").pos[:2] = (1, 2)
    model.body("agent").quat[:] = (np.sqrt(0.5), 0, 0, np.sqrt(0.5))
    data.qpos[:3] = 0
    model.body("hazard0").pos[:2] = (1, 3)  # one metre ahead
    model.body("hazard1").pos[:2] = (-1, 2)  # two metres to the left
    model.body("goal").pos[:2] = (1.5, 1)  # one metre behind, half a metre to the right
    mujoco.mj_forward(model, data)
    obs = sim.observe()[VECTOR]
    at = {name: obs[start:stop] for name, (start, stop) in env.spec.slices.items()}
    np.testing.assert_allclose(at["hazards"][:4], [1, 0, 0, 2], atol=1e-6)
    np.testing.assert_allclose(at["goal"], [-1, -0.5], atol=1e-6)
    np.testing.assert_allclose(at["rotation"], [0, -1], atol=1e-6)
    np.testing.assert_allclose(at["position"], [1, 2], atol=1e-6)


def test_coordinates_keep_horizontal_distances_for_a_leaning_robot():
    env = make_env("SafetyAntGoal1-v0", "coordinates", 1, seed=0)
    env.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 8)):
        obs = env.step(action).obs[VECTOR]
    task: Any = env._sim._task  # pyright: ignore[reportAttributeAccessIssue]
    assert task.agent.mat[2, 2] < 0.9999
    hazards = obs[slice(*env.spec.slices["hazards"])].reshape(-1, 2)
    expected = [task.agent.dist_xy(position) for position in task.hazards.pos]
    np.testing.assert_allclose(np.hypot(*hazards.T), expected, rtol=1e-5)


def test_same_seed_same_episodes():
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 2))
    one = rollout(make_env("SafetyPointButton1-v0", "lidar", 3, seed=5), actions)
    same = make_env("SafetyPointButton1-v0", "lidar", 3, seed=5)
    two = rollout(same, actions)
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1] == two[1]
    np.testing.assert_array_equal(rollout(same, actions, seed=5)[0], one[0])
    assert not np.array_equal(rollout(same, actions)[0], one[0])
    assert not np.array_equal(rollout(same, actions, seed=6)[0], one[0])


@pytest.mark.parametrize("task", ["SafetyPointGoal1-v0", "SafetySwimmerVelocity-v1"])
def test_unseeded_first_reset_follows_the_constructors_seed(task):
    first = make_env(task, "lidar", 1, seed=7).reset()[VECTOR]
    np.testing.assert_array_equal(make_env(task, "lidar", 1).reset(7)[VECTOR], first)


def test_truncation_cuts_the_repeat_and_is_not_termination():
    env = make_env("SafetyPointCircle0-v0", "lidar", 7, seed=0)  # 500 = 71 * 7 + 3
    env.reset()
    outcomes = [env.step(np.zeros(2)) for _ in range(72)]
    assert [o.env_steps for o in outcomes] == [7] * 71 + [3]
    assert [o.truncated for o in outcomes] == [False] * 71 + [True]
    assert not any(o.terminated for o in outcomes)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2))


def test_velocity_time_limit():
    env = make_env("SafetySwimmerVelocity-v1", "lidar", 300, seed=0)
    env.reset()
    outcomes = [env.step(np.zeros(2)) for _ in range(4)]
    assert [(o.env_steps, o.terminated, o.truncated) for o in outcomes][-2:] == [
        (300, False, False),
        (100, False, True),
    ]


def test_termination_cuts_the_repeat_and_is_not_truncation():
    env = make_env("SafetyHopperVelocity-v1", "lidar", 50, seed=0)
    env.reset()
    action = np.ones(3)
    while not (outcome := env.step(action)).terminated:
        assert outcome.env_steps == 50
    assert 0 < outcome.env_steps < 50
    assert not outcome.truncated


def test_actions_are_normalised_to_the_robots_range():
    env = make_env("SafetyRacecarGoal0-v0", "lidar", 1, seed=0)
    env.reset()
    data = env._sim._task.data  # pyright: ignore[reportAttributeAccessIssue]
    env.step(np.array([0.5, -1.0]))
    np.testing.assert_allclose(data.ctrl, [10, -0.785])
    env.step(np.array([9.0, 0.5]))
    np.testing.assert_allclose(data.ctrl, [20, 0.3925])
