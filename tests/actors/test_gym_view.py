import warnings

import numpy as np
import pytest

from actors.gym_view import GymView
from actors.safety_gym import make_env
from common.types import VECTOR


@pytest.mark.parametrize(
    ("task", "observation"), [("SafetyPointGoal1-v0", "coordinates"), ("SafetyHopperVelocity-v1", "lidar")]
)
def test_passes_gymnasiums_checker(task, observation):
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        check_env(GymView(task, observation, 5), skip_render_check=True)
    # Sensors have no bounds; that is the one thing the checker may remark.
    assert [str(w.message) for w in caught if "infinity" not in str(w.message)] == []


def test_shows_the_environment_behind_it():
    view, env = GymView("SafetyPointGoal1-v0", "lidar", 4), make_env("SafetyPointGoal1-v0", "lidar", 4)
    np.testing.assert_array_equal(view.reset(seed=3)[0], env.reset(3)[VECTOR])
    assert view.observation_space.contains(view.reset(seed=3)[0])
    env.reset(3)
    for action in np.random.default_rng(0).uniform(-1, 1, (10, 2)).astype(np.float32):
        obs, reward, terminated, truncated, info = view.step(action)
        expected = env.step(action)
        np.testing.assert_array_equal(obs, expected.obs[VECTOR])
        assert (reward, terminated, truncated) == (expected.reward, expected.terminated, expected.truncated)
        assert info == {"cost": expected.cost, "env_steps": 4}
