"""The acting loop with a scripted environment, a policy that shows its inputs, and lists as writers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actors.inference import LocalInference
from actors.rollout import EpisodeMeter, Rollout
from common.types import ArraySpec, EnvSpec, Policy, Step, replay_spec

LENGTH = 4  # agent steps per episode
REPEAT = 5
SPEC = EnvSpec("Scripted", {"vector": ArraySpec((2,))}, 1, REPEAT, LENGTH * REPEAT)


class ScriptedEnv:
    """Environment i observes [i, t = steps since the reset]; reward 10 i + t, cost i; staggered ends."""

    spec = SPEC

    def __init__(self, num_envs: int = 3):
        self.num_envs = num_envs
        self.partial = np.zeros(num_envs, bool)
        self.seen: list[np.ndarray] = []
        self.closed = False
        self._t = np.full(num_envs, -1)
        self._end = np.arange(1, num_envs + 1)

    def step(self, actions: np.ndarray) -> Step:
        self.seen.append(actions.copy())
        first = (self._t == -1) | (self._t == self._end)
        self._end = np.where(first & (self._t != -1), LENGTH, self._end)
        self._t = np.where(first, 0, self._t + 1)
        numbers = np.arange(self.num_envs)
        is_last = self._t == self._end
        self.partial = is_last & (self._end < LENGTH)
        return Step(
            obs={"vector": np.stack([numbers, self._t], 1).astype(np.float32)},
            reward=np.where(first, 0, 10 * numbers + self._t).astype(np.float32),
            cost=np.where(first, 0, numbers).astype(np.float32),
            is_first=first,
            is_last=is_last,
            is_terminal=is_last & (numbers == 1),
            env_steps=np.where(first, 0, REPEAT).astype(np.int32),
        )

    def close(self) -> None:
        self.closed = True


def _act(params: Any, carry: Any, obs: dict, is_first: Any, key: Any) -> tuple:
    """Acts (params + obs) / 100; its carry counts the decisions of the episode so far."""
    carry = jnp.where(is_first, 0, carry + 1)
    actions = (params + obs["vector"].sum(1, keepdims=True)) / 100
    return carry, actions, {"carry": carry.sum(), "params": params}


POLICY = Policy(lambda k: jnp.zeros(k, jnp.int32), _act)
NOISE = Policy(lambda k: (), lambda p, c, obs, first, key: (c, jax.random.uniform(key, (len(first), 1)), {}))


class Source:
    """Publishes `versions[v]` as version v as soon as `newest` says so."""

    def __init__(self, versions: dict[int, float] | None = None):
        self.versions = versions or {1: 0.0}
        self.newest: int | None = min(self.versions)

    def get(self, have: int) -> tuple[int, Any] | None:
        if self.newest is None or self.newest <= have:
            return None
        return self.newest, np.float32(self.versions[self.newest])


class ListWriter:
    def __init__(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []
        self.waited_seconds = 0.0
        self.closed = False
        self.held = False

    def admit(self) -> bool:
        return not self.held

    def append(self, step: Any) -> None:
        self.steps.append({name: np.array(value) for name, value in step.items()})
        self.waited_seconds += 0.5

    def close(self) -> None:
        self.closed = True

    def column(self, name: str) -> np.ndarray:
        return np.array([step[name] for step in self.steps])


def make(num_envs: int = 3, **options: Any) -> tuple[Rollout, ScriptedEnv, list[ListWriter], Source]:
    env, source = ScriptedEnv(num_envs), options.pop("source", None) or Source()
    writers = [ListWriter() for _ in range(num_envs)]
    arguments = {"policy": POLICY, "seed": 0, "name": "actor7"} | options
    policy, seed = arguments.pop("policy"), arguments["seed"]
    inference = arguments.pop("inference", None) or LocalInference(policy, source, SPEC.obs, num_envs, seed)
    rollout = Rollout(env, inference, writers, **arguments)
    rollout.warm_up(1.0)
    return rollout, env, writers, source


def steps(count: int) -> Callable[[], bool]:
    """A `should_stop` that lets `count` decisions happen."""
    calls = itertools.count()
    return lambda: next(calls) >= count


def test_the_stream_holds_every_step_with_the_action_chosen_there():
    rollout, env, writers, _ = make()
    report = rollout.run(60.0, 10**6, steps(9))
    for i, writer in enumerate(writers):
        assert len(writer.steps) == 9
        assert writer.steps[0].keys() == replay_spec(SPEC).keys()
        for name, spec in replay_spec(SPEC).items():
            column = writer.column(name)
            assert column.shape == (9, *spec.shape), name
            assert column.dtype == np.dtype(spec.dtype), name
        obs, action = writer.column("vector"), writer.column("action")
        np.testing.assert_array_equal(obs[:, 0], i)
        np.testing.assert_allclose(action[:, 0], obs.sum(1) / 100)
        # What is stored at a step is what the environment is asked to do next.
        np.testing.assert_array_equal(action[:-1, 0], [seen[i, 0] for seen in env.seen[1:]])
        t, first = obs[:, 1], writer.column("is_first")
        np.testing.assert_array_equal(first, t == 0)
        np.testing.assert_array_equal(writer.column("reward"), np.where(first, 0, 10 * i + t))
        np.testing.assert_array_equal(writer.column("cost"), np.where(first, 0, i))
        np.testing.assert_array_equal(writer.column("version"), 1)
    assert writers[1].column("is_terminal").any()
    assert not writers[2].column("is_terminal").any()
    assert list(np.flatnonzero(writers[2].column("is_last"))) == [3, 8]
    acted = sum(int((~writer.column("is_first")).sum()) for writer in writers)
    assert (report.agent_steps, report.env_steps) == (acted, REPEAT * acted)  # resets are no steps
    assert report.waited_seconds == pytest.approx(9 * 3 * 0.5)
    assert report.version == 1
    assert report.seconds > 0


def test_the_stream_goes_on_from_slice_to_slice():
    rollout, _, writers, _ = make()
    for _ in range(4):
        rollout.run(60.0, 10**6, steps(3))
    whole, _, expected, _ = make()
    whole.run(60.0, 10**6, steps(12))
    for writer, other in zip(writers, expected, strict=True):
        for name in writer.steps[0]:
            np.testing.assert_array_equal(writer.column(name), other.column(name))


def test_complete_episodes_are_reported_once_and_cut_ones_never():
    rollout, _, _, source = make(2, source=Source({5: 0.0}))
    reports = [rollout.run(60.0, 10**6, steps(1)) for _ in range(2 + 2 * (LENGTH + 1) + 2)]
    episodes = [episode for report in reports for episode in report.episodes]
    # First ends after 1 and 2 steps are cut; two whole episodes of each follow.
    assert sorted(e.source for e in episodes) == ["actor7/env0"] * 2 + ["actor7/env1"] * 2
    for episode in episodes:
        i = int(episode.source[-1])
        assert episode.return_ == sum(10 * i + t for t in range(1, LENGTH + 1))
        assert episode.cost == i * LENGTH
        assert episode.length == LENGTH * REPEAT
        assert episode.version == source.newest


def test_a_slice_ends_at_its_env_steps_its_time_or_its_stop():
    rollout, _, writers, _ = make()
    report = rollout.run(60.0, 100)
    assert 100 <= report.env_steps < 100 + 3 * REPEAT
    assert rollout.run(0.0, 10**6).env_steps == 0
    report = rollout.run(0.05, 10**9)
    assert 0.05 <= report.seconds < 5
    before = len(writers[0].steps)
    assert rollout.run(60.0, 10**6, lambda: True).agent_steps == 0
    assert len(writers[0].steps) == before


def test_nobody_acts_while_a_writer_is_held_back():
    rollout, env, writers, _ = make()
    rollout.run(60.0, 10**6, steps(3))
    seen = len(env.seen)
    writers[1].held = True
    report = rollout.run(0.05, 10**6)
    assert (report.agent_steps, len(env.seen)) == (0, seen)
    writers[1].held = False
    rollout.run(60.0, 10**6, steps(2))
    assert len(env.seen) == seen + 2


def test_random_steps_come_first_and_the_policy_begins_afresh():
    rollout, env, writers, _ = make(3, random_steps=12)
    report = rollout.run(60.0, 10**6, steps(4))
    assert report.stats == {}
    random = np.array([writer.column("action")[:4, 0] for writer in writers])
    assert (np.abs(random) <= 1).all()
    assert len(np.unique(random)) == 12
    assert random.min() < -0.3 < 0.3 < random.max()  # both directions
    np.testing.assert_array_equal(np.array(env.seen[1:])[:, :, 0], random.T[:3])
    # Nobody told the policy of these steps: its first carry is that of an episode's start.
    report = rollout.run(60.0, 10**6, steps(1))
    assert report.stats["carry"] == 0
    assert not writers[0].column("is_first")[4]
    np.testing.assert_allclose(writers[0].column("action")[4, 0], writers[0].column("vector")[4].sum() / 100)
    report = rollout.run(60.0, 10**6, steps(1))
    assert report.stats["carry"] > 0


def test_newer_parameters_are_taken_up_between_two_decisions(monkeypatch):
    monkeypatch.setattr("actors.inference.REFRESH_SECONDS", 0.0)
    rollout, _, writers, source = make(source=Source({1: 0.0, 2: 50.0}))
    rollout.run(60.0, 10**6, steps(2))
    source.newest = 2
    report = rollout.run(60.0, 10**6, steps(2))
    assert report.version == 2
    assert report.stats["params"] == 50.0
    np.testing.assert_array_equal(writers[0].column("version"), [1, 1, 2, 2])
    source.newest = None  # the holder does not answer: acting goes on
    assert rollout.run(60.0, 10**6, steps(2)).version == 2
    assert writers[0].column("action")[-1, 0] >= 0.5


def test_the_holder_is_not_asked_at_every_decision():
    rollout, _, _, source = make(source=Source({1: 0.0, 2: 50.0}))
    asked: list[int] = []
    source.get = lambda have: asked.append(have)  # pyright: ignore[reportAttributeAccessIssue]
    rollout.run(60.0, 10**6, steps(50))
    assert len(asked) < 10


def test_warming_up_waits_for_the_first_parameters_only_so_long():
    source = Source()
    source.newest = None
    env = ScriptedEnv()
    inference = LocalInference(POLICY, source, SPEC.obs, env.num_envs, 0)
    rollout = Rollout(env, inference, [], seed=0, name="a")
    with pytest.raises(TimeoutError, match="no parameters were published within 0 s"):
        rollout.warm_up(0.1)


def test_who_is_too_far_behind_the_newest_parameters_pauses_until_it_has_caught_up(monkeypatch):
    monkeypatch.setattr("actors.inference.REFRESH_SECONDS", 0.0)
    rollout, env, _, source = make(source=Source({1: 0.0, 5: 50.0}), max_staleness=3)
    assert rollout.run(60.0, 10**6, steps(2), newest=4).agent_steps > 0  # three versions behind will do
    before = len(env.seen)
    report = rollout.run(0.3, 10**6, newest=5)
    assert (report.agent_steps, len(env.seen)) == (0, before)
    assert 0.2 < report.paused_seconds <= report.seconds
    source.newest = 5
    report = rollout.run(60.0, 10**6, steps(2), newest=5)
    assert report.agent_steps > 0
    assert (report.paused_seconds, report.version) == (0, 5)


def test_random_actions_are_never_too_old():
    rollout, env, _, _ = make(max_staleness=1, random_steps=6)
    rollout.run(60.0, 10**6, steps(2), newest=9)
    assert len(env.seen) == 2


def test_a_step_waits_for_its_decision_and_is_neither_lost_nor_repeated():
    class Slow(LocalInference):
        """Answers every third time."""

        asked = 0

        def act(self, *args: Any) -> Any:
            self.asked += 1
            return None if self.asked % 3 else super().act(*args)

    policy = (POLICY, Source(), SPEC.obs, 3, 0)
    rollout, env, writers, _ = make(inference=Slow(*policy))
    slow = sum(rollout.run(60.0, 10**6, steps(3 * n)).agent_steps for n in (1, 2, 1))
    whole, _, expected, _ = make(inference=LocalInference(*policy))
    assert whole.run(60.0, 10**6, steps(4)).agent_steps == slow
    assert len(env.seen) == 4
    for writer, other in zip(writers, expected, strict=True):
        for name in writer.steps[0]:
            np.testing.assert_array_equal(writer.column(name), other.column(name))


@pytest.mark.parametrize("policy", [NOISE, POLICY])
@pytest.mark.parametrize("random_steps", [0, 6])
def test_the_seed_decides_over_all_noise(policy, random_steps):
    def actions(seed: int) -> np.ndarray:
        rollout, _, writers, _ = make(policy=policy, seed=seed, random_steps=random_steps)
        rollout.run(60.0, 10**6, steps(6))
        return np.array([writer.column("action") for writer in writers])

    np.testing.assert_array_equal(actions(1), actions(1))
    if policy is NOISE or random_steps:
        assert not np.array_equal(actions(1), actions(2))
    if policy is NOISE:
        assert len(np.unique(actions(1))) == 18  # no key is used twice


def test_closing_sends_the_rest_and_frees_the_environments():
    rollout, env, writers, _ = make()
    rollout.close()
    assert env.closed
    assert all(writer.closed for writer in writers)


def test_the_meter_by_hand():
    meter = EpisodeMeter(2, "a")

    def step(first: bool, last: bool, reward: float) -> Step:
        two = lambda value, dtype: np.full(2, value, dtype)  # noqa: E731
        arrays = (two(reward, np.float32), two(2.0, np.float32), two(first, bool), two(last, bool))
        return Step({}, *arrays, two(False, bool), two(0 if first else 5, np.int32))

    assert meter.add(step(True, False, 100.0)._replace(cost=np.zeros(2)), np.zeros(2, bool), 1) == []
    assert meter.add(step(False, False, 1.0), np.zeros(2, bool), 1) == []
    (only,) = meter.add(step(False, True, 3.0), np.array([True, False]), 9)
    assert (only.return_, only.cost, only.length, only.version, only.source) == (104.0, 4.0, 10, 9, "a/env1")
    assert meter.add(step(True, False, 0.0), np.zeros(2, bool), 1) == []
    first, _ = meter.add(step(False, True, 7.0), np.zeros(2, bool), 1)
    assert (first.return_, first.length) == (7.0, 5)
