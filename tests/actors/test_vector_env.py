import numpy as np
import pytest

from actors.safety_gym import make_env
from actors.vector_env import SafetyVectorEnv
from common.types import VECTOR

TASK = "SafetyPointCircle0-v0"  # 500 env steps


def make(num_envs=4, seed=0, stagger=True, repeat=10):
    return SafetyVectorEnv(TASK, "lidar", repeat, num_envs, seed, stagger)


def random_actions(env, count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, env.num_envs, env.spec.action_size)).astype(np.float32)


def test_first_step_resets_all():
    env = make()
    step = env.step(np.ones((4, 2), np.float32))
    assert step.is_first.all()
    for values in (step.reward, step.cost, step.env_steps, step.is_last, step.is_terminal):
        assert not values.any()
    assert step.obs[VECTOR].shape == (4, *env.spec.obs[VECTOR].shape)
    assert step.obs[VECTOR].dtype == step.reward.dtype == step.cost.dtype == np.float32
    assert len(np.unique(step.obs[VECTOR], axis=0)) == 4  # every environment has a seed of its own


def test_first_episodes_end_staggered_and_are_marked():
    env = make()
    ends = []
    for number, actions in enumerate(random_actions(env, 104)):
        step = env.step(actions)
        ends += [(number, i, bool(env.partial[i])) for i in np.flatnonzero(step.is_last)]
        assert not step.is_terminal.any()
        assert (env.partial <= step.is_last).all()
    # 500 env steps are 50 agent steps after the reset step; shares 1/4, 2/4, 3/4 of 500 round up
    # to whole agent steps; the next episodes are complete.
    assert ends == [
        (13, 0, True),
        (25, 1, True),
        (38, 2, True),
        (50, 3, False),
        (13 + 51, 0, False),
        (25 + 51, 1, False),
        (38 + 51, 2, False),
        (50 + 51, 3, False),
    ]


def test_the_step_after_an_end_is_a_reset():
    env = make(num_envs=2)
    previous = env.step(np.zeros((2, 2), np.float32))
    resets = 0
    for actions in random_actions(env, 60):
        step = env.step(actions)
        np.testing.assert_array_equal(step.is_first, previous.is_last)
        np.testing.assert_array_equal(step.env_steps == 0, step.is_first)
        assert not step.reward[step.is_first].any()
        resets += step.is_first.sum()
        previous = step
    assert resets == 2


def test_deterministic_per_seed():
    one, two, other = make(2, seed=1), make(2, seed=1), make(2, seed=2)
    for actions in random_actions(one, 30):
        a, b, c = one.step(actions), two.step(actions), other.step(actions)
        np.testing.assert_array_equal(a.obs[VECTOR], b.obs[VECTOR])
        np.testing.assert_array_equal(a.reward, b.reward)
        assert not np.array_equal(a.obs[VECTOR], c.obs[VECTOR])


def test_returned_steps_are_not_overwritten():
    env = make(2)
    actions = random_actions(env, 3)
    env.step(actions[0])
    kept = env.step(actions[1])
    copy = [np.copy(kept.obs[VECTOR]), *map(np.copy, kept[1:])]
    env.step(actions[2])
    for now, then in zip([kept.obs[VECTOR], *kept[1:]], copy, strict=True):
        np.testing.assert_array_equal(now, then)


def test_bad_actions_and_failing_environments_are_named(monkeypatch):
    env = make(3)
    env.step(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full((3, 2), np.nan, np.float32))

    def fail(action):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(env._envs[1], "step", fail)
    with pytest.raises(RuntimeError, match=f"Environment 1 of {TASK}.*boom") as caught:
        env.step(np.zeros((3, 2), np.float32))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def play(env):
    """Returns, lengths and ends of one evaluation, whose environments do not end together."""
    total, length, ends, terminal = np.zeros((4, env.num_envs))
    first = env.step(np.zeros((env.num_envs, env.spec.action_size), np.float32))
    assert first.is_first.all()
    waited = 0
    while not env.finished.all():
        step = env.step(np.ones((env.num_envs, env.spec.action_size), np.float32))
        total += step.reward
        length += step.env_steps
        ends += step.is_last
        terminal += step.is_terminal
        waiting = env.finished & ~step.is_last
        waited += waiting.sum()
        assert not step.env_steps[waiting].any()
        assert not step.is_first.any()
    return first.obs[VECTOR], total, length, ends, terminal, waited


def test_evaluation_plays_each_seed_once_and_can_be_repeated():
    env = SafetyVectorEnv.for_evaluation("SafetyHopperVelocity-v1", "lidar", 2, seeds=[3, 4, 8])
    obs, total, length, ends, terminal, waited = play(env)
    for row, seed in zip(obs, [3, 4, 8], strict=True):
        expected = make_env("SafetyHopperVelocity-v1", "lidar", 2).reset(seed)[VECTOR]
        np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(ends, 1)
    np.testing.assert_array_equal(terminal, 1)
    assert len(set(length)) > 1
    assert waited > 0
    again = play(env)
    np.testing.assert_array_equal(again[0], obs)
    np.testing.assert_array_equal(again[1], total)
    np.testing.assert_array_equal(again[2], length)
