"""Our environments against the untouched package: same seeds, same actions, same numbers.

An untouched reset costs a second. PointGoal1 is compared with everything untouched; the others with
the package on light resets, which `test_fast_reset_is_bitwise_exact_and_fast` covers by itself.
"""

import contextlib
import time
from collections.abc import Callable

import numpy as np
import pytest

from actors import fast_reset
from actors.compat import safety_gymnasium
from actors.safety_gym import make_env
from common.types import VECTOR

SEED = 3
VELOCITY_ROBOTS = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid")


class Package:
    """The package as it comes, with a plain loop as action repeat."""

    def __init__(
        self,
        task: str,
        repeat: int,
        reset_context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.reset_context = reset_context
        self.env = safety_gymnasium().make(task)
        self.repeat = repeat
        space = self.env.action_space
        self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
        self.goals = 0

    def reset(self, seed=None):
        with self.reset_context():
            return self.env.reset(seed=seed)[0]

    def step(self, action):
        scaled = (self.high + self.low) / 2 + np.clip(action, -1, 1).astype(float) * (
            self.high - self.low
        ) / 2
        reward = cost = 0.0
        count = 0
        for _ in range(self.repeat):
            count += 1
            obs, r, c, terminated, truncated, info = self.env.step(scaled)
            reward, cost = reward + r, cost + c
            self.goals += "goal_met" in info
            if terminated or truncated:
                break
        return obs, (reward, cost, terminated, truncated, count)


def assert_same_obs(ours, theirs):
    # A vectorised lidar may round differently by 2e-16 before the cast.
    np.testing.assert_allclose(ours, theirs.astype(np.float32), rtol=1e-6, atol=1e-12)


# Together: every robot, every kind of task, every kind of object.
@pytest.mark.parametrize(
    ("task", "repeat", "reset_context"),
    [
        ("SafetyPointGoal1-v0", 5, contextlib.nullcontext),
        ("SafetyCarButton2-v0", 3, fast_reset.light_assets),
        ("SafetyAntGoal2-v0", 4, fast_reset.light_assets),
        ("SafetyRacecarPush2-v0", 5, fast_reset.light_assets),
        ("SafetyPointCircle2-v0", 5, fast_reset.light_assets),
        ("SafetyDoggoRun0-v0", 2, fast_reset.light_assets),
        ("SafetyDoggoPush1-v0", 3, fast_reset.light_assets),
        *((f"Safety{robot}Velocity-v1", 3, contextlib.nullcontext) for robot in VELOCITY_ROBOTS),
    ],
)
def test_lidar_rollout_is_the_packages_across_resets(task, repeat, reset_context):
    ours, theirs = make_env(task, "lidar", repeat, SEED), Package(task, repeat, reset_context)
    assert_same_obs(ours.reset()[VECTOR], theirs.reset(SEED))
    rng = np.random.default_rng(1)
    for step in range(40):
        action = rng.uniform(-1.3, 1.3, ours.spec.action_size).astype(np.float32)  # also clipped ones
        outcome = ours.step(action)
        obs, rest = theirs.step(action)
        assert tuple(outcome[1:]) == rest  # bitwise
        assert_same_obs(outcome.obs[VECTOR], obs)
        if outcome.terminated or outcome.truncated or step == 20:
            # Not seeded: goes on with the stream of random numbers.
            assert_same_obs(ours.reset()[VECTOR], theirs.reset())


def their_coordinates(task):
    """The 29 numbers of PointGoal1 from the package's own accessors."""
    sensor, agent = task.agent.get_sensor, task.agent
    objects = [task.goal.pos, *task.hazards.pos]
    parts = [
        sensor("velocimeter")[:2],
        sensor("accelerometer")[:1],
        sensor("gyro")[2:],
        sensor("magnetometer"),
    ]
    parts += [task._ego_xy(position[:2]) for position in objects]
    return np.concatenate([*parts, agent.mat[0, :2], agent.pos[:2]])


def drive_to(name, obs, spec):
    x, y = obs[spec.slices[name][0] :][:2]
    angle = np.arctan2(y, x)
    return np.array([1.0 if abs(angle) < 0.5 else -0.2, angle], np.float32)


@pytest.mark.parametrize(
    ("task", "reset_context"),
    [
        ("SafetyPointGoal1-v0", contextlib.nullcontext),
        ("SafetyPointGoal2-v0", fast_reset.light_assets),  # vases: contacts and speeds
    ],
)
def test_driving_through_goals_and_hazards_is_the_packages(task, reset_context):
    ours, theirs = make_env(task, "coordinates", 5, SEED), Package(task, 5, reset_context)
    obs = ours.reset()[VECTOR]
    theirs.reset(SEED)
    inner = theirs.env.unwrapped.task
    costs = 0.0
    for step in range(140):
        if task == "SafetyPointGoal1-v0":
            np.testing.assert_allclose(obs, their_coordinates(inner), rtol=1e-5, atol=1e-6)
        action = drive_to("hazards" if step < 40 else "goal", obs, ours.spec)
        outcome = ours.step(action)
        assert tuple(outcome[1:]) == theirs.step(action)[1]
        obs, costs = outcome.obs[VECTOR], costs + outcome.cost
    assert costs > 0
    assert theirs.goals >= 2  # new goals are drawn from the random stream: it must not have moved


def test_pressing_buttons_is_the_packages():
    ours = make_env("SafetyPointButton1-v0", "lidar", 5, SEED)
    theirs = Package("SafetyPointButton1-v0", 5, fast_reset.light_assets)
    ours.reset()
    theirs.reset(SEED)
    task, costs = theirs.env.unwrapped.task, 0.0
    for _ in range(150):
        x, y = task._ego_xy(task.goal.pos[:2])
        action = np.array([1.0, 3 * np.arctan2(y, x)], np.float32)
        outcome = ours.step(action)
        obs, rest = theirs.step(action)
        assert tuple(outcome[1:]) == rest
        assert_same_obs(outcome.obs[VECTOR], obs)
        costs += outcome.cost
    assert theirs.goals >= 2
    assert costs > 0


def test_fast_reset_is_bitwise_exact_and_fast():
    full, light = (safety_gymnasium().make("SafetyPointGoal2-v0") for _ in range(2))

    def light_reset(seed=None):
        with fast_reset.light_assets():
            return light.reset(seed=seed)[0]

    np.testing.assert_array_equal(full.reset(seed=SEED)[0], light_reset(SEED))
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 2))
    for action in actions:
        one, two = full.step(action), light.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:] == two[1:]
    started = time.process_time()
    expected = full.reset()[0]
    middle = time.process_time()
    np.testing.assert_array_equal(expected, light_reset())
    assert time.process_time() - middle < (middle - started) / 10


def test_crowded_layouts_are_drawn_alike():
    with fast_reset.light_assets():
        theirs = safety_gymnasium().make("SafetyDoggoButton2-v0")
        ours = make_env("SafetyDoggoButton2-v0", "lidar", 1, SEED)
        assert_same_obs(ours.reset()[VECTOR], theirs.reset(seed=SEED)[0])
        for _ in range(2):
            assert_same_obs(ours.reset()[VECTOR], theirs.reset()[0])
