"""The training loop, with a training step that adds up what it is fed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import Config
from common.configuration import merge
from common.types import ArraySpec, EnvSpec, EpisodeResult, UserError, replay_spec
from learner.lagrange import Constraint
from learner.learner import Learner, _compiler_options

SPEC = EnvSpec("Fake", {"vector": ArraySpec((2,))}, 1, 5, 100)
CONFIG = merge(
    Config(),
    {
        "learner": {
            "batch_size": 2,
            "batch_length": 3,
            "publish_every": 4,
            "log_every": 2,
            "max_bad_updates": 3,
        }
    },
    "test",
)


class Multiplier(NamedTuple):
    multiplier: jax.Array
    seen: jax.Array  # 1000 * cost + env steps of the newest episode


class State(NamedTuple):
    total: jax.Array  # of all rewards in all batches
    multiplier: Multiplier
    bad_in_row: jax.Array


class FakeTrain:
    """A `TrainStep`; a NaN reward makes a bad update, which changes nothing but the count of these."""

    spec, cfg = SPEC, CONFIG
    constraint = Constraint(
        init=lambda: Multiplier(jnp.zeros(()), jnp.zeros(())),
        penalise=lambda *_: (jnp.zeros(()), jnp.zeros(())),
        on_batch=lambda state, violation: state,
        on_episode=lambda state, cost, env_steps: Multiplier(
            state.multiplier + cost, 1000.0 * cost + env_steps
        ),
    )

    def start(self, sharding: Any) -> State:
        zero = State(jnp.zeros(()), self.constraint.init(), jnp.zeros((), jnp.int32))
        return jax.device_put(zero, sharding)

    def step(self, state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        amount = batch["reward"].sum()
        good = jnp.isfinite(amount)
        new = state._replace(
            total=state.total + jnp.where(good, amount, 0.0),
            bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
        )
        return new, {"loss/model": batch["reward"].mean(), "safety/multiplier": state.multiplier.multiplier}

    def acting(self, state: State) -> dict[str, jax.Array]:
        return {"total": state.total}


def batch(value: float) -> dict[str, np.ndarray]:
    """A batch whose rewards are all `value`; their sum is 6 times that."""
    content = {name: np.zeros((2, 3, *spec.shape), spec.dtype) for name, spec in replay_spec(SPEC).items()}
    return content | {"reward": np.full((2, 3), value, np.float32)}


class Feed:
    """A source that gives the batches of these values, then none; the clock of the learner runs out then."""

    def __init__(self, *values: float | None):
        self.values: list[float | None] = list(values)

    def __call__(self, timeout: float) -> dict[str, np.ndarray] | None:
        if not self.values:
            time.sleep(timeout)
            return None
        value = self.values.pop(0)
        return None if value is None else batch(value)


def make(tmp_path: Path, feed: Any) -> tuple[Learner, list[tuple[int, Any]]]:
    published: list[tuple[int, Any]] = []
    train: Any = FakeTrain()
    learner = Learner(train, feed, lambda version, params: published.append((version, params)), tmp_path)
    learner.compile()
    return learner, published


def episode(cost: float) -> EpisodeResult:
    return EpisodeResult(1.0, cost, 100, 1, "actor0/env0")


def total(learner: Learner, published: list[tuple[int, Any]]) -> float:
    learner.publish()
    return float(published[-1][1][0])


def test_every_batch_is_one_update(tmp_path):
    learner, published = make(tmp_path, Feed(1, 2, None, 3))
    report = learner.run(0.3)
    assert report.updates == 3
    assert report.replayed_steps == 3 * 6
    assert total(learner, published) == 6 * (1 + 2 + 3)
    assert 0.2 < report.waited_seconds <= report.seconds < 5  # for the batches that did not come
    assert report.seconds >= 0.3


def test_a_slice_counts_its_own_replay_and_all_updates(tmp_path):
    feed = Feed(1, 1)
    learner, _ = make(tmp_path, feed)
    learner.run(0.2)
    feed.values = [1.0]
    report = learner.run(0.2)
    assert (report.updates, report.replayed_steps) == (3, 6)


def test_no_time_means_no_update_but_episodes_count(tmp_path):
    """So the driver hands over the last episodes before it saves."""
    learner, _ = make(tmp_path, Feed(1, 1))
    report = learner.run(0.0, [episode(5.0)], 700)
    assert (report.updates, report.metrics) == (0, {})
    learner.save(tmp_path, {"env_steps": 1})
    again, _ = make(tmp_path / "other", Feed(1))
    again.restore(tmp_path)
    assert again.run(0.2).metrics["safety/multiplier"] == 5.0


def test_parameters_are_published_in_versions_as_numpy_arrays(tmp_path):
    learner, published = make(tmp_path, Feed(*[1.0] * 9))
    assert learner.publish() == 1
    report = learner.run(0.3)
    assert [version for version, _ in published] == [1, 2, 3]  # after 4 and 8 updates
    assert [float(total) for _, (total,) in published] == [0.0, 24.0, 48.0]
    assert all(isinstance(total, np.ndarray) for _, (total,) in published)
    assert report.version == 3


def test_metrics_are_means_over_the_slice_and_the_newest_multiplier(tmp_path):
    feed = Feed(1, 2, 6)
    learner, _ = make(tmp_path, feed)
    metrics = learner.run(0.3, [episode(2.0)]).metrics
    assert metrics == {"loss/model": 3.0, "safety/multiplier": 2.0}
    assert all(isinstance(value, float) for value in metrics.values())
    feed.values = [10.0]
    assert learner.run(0.2, [episode(3.0)]).metrics == {"loss/model": 10.0, "safety/multiplier": 5.0}


def test_episodes_reach_the_constraint_in_order_with_the_env_steps(tmp_path):
    learner, _ = make(tmp_path, Feed(1))
    learner.run(0.0, [episode(1.0), episode(2.0)], 500)
    learner.run(0.0, [episode(4.0)], 700)
    learner.run(0.0, [], 900)
    learner.save(tmp_path, {"env_steps": 1})
    restored = learner.restore(tmp_path)
    assert restored is not None
    assert float(restored.tree.multiplier.multiplier) == 7.0
    assert float(restored.tree.multiplier.seen) == 4700.0


def test_a_checkpoint_continues_everything(tmp_path):
    learner, published = make(tmp_path, Feed(1, 2, 3, 4, 5))
    learner.run(0.3, [episode(2.0)], 100)
    learner.save(tmp_path / "checkpoints", {"env_steps": 300, "more": [1, 2]})
    last = published[-1][0]

    again, told = make(tmp_path / "other", Feed(10))
    restored = again.restore(tmp_path / "checkpoints")
    assert restored is not None
    assert (restored.step, restored.meta["env_steps"], restored.meta["more"]) == (300, 300, [1, 2])
    assert (restored.meta["updates"], restored.meta["version"]) == (5, last)
    report = again.run(0.3)
    assert report.updates == 6
    assert report.metrics["safety/multiplier"] == 2.0
    assert total(again, told) == 6 * (15 + 10)
    assert told[-1][0] == last + 1  # versions never go back: actors would keep the older parameters


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    learner, published = make(tmp_path, Feed())
    assert learner.restore(tmp_path / "nowhere") is None
    assert total(learner, published) == 0.0


def test_bad_updates_in_a_row_stop_the_run_with_a_dump(tmp_path):
    nan = float("nan")
    learner, _ = make(tmp_path, Feed(1, nan, nan, nan, nan, 1, 1, 1))
    with pytest.raises(UserError, match=r"the last [34] updates were not finite") as error:
        learner.run(5.0)
    (dump,) = tmp_path.glob("bad_batch_*.npz")
    assert str(dump) in str(error.value)
    with np.load(dump) as content:
        assert set(content) == set(replay_spec(SPEC))
        assert np.isnan(content["reward"]).all()


def test_single_bad_updates_are_survived(tmp_path):
    nan = float("nan")
    learner, published = make(tmp_path, Feed(*[1.0, nan, nan, 1.0] * 5))
    report = learner.run(0.5)
    assert report.updates == 20
    assert total(learner, published) == 60.0
    assert not list(tmp_path.glob("*.npz"))


def test_an_optimisation_level_of_the_users_own_wins(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert _compiler_options() == {"xla_backend_optimization_level": "1"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_dump_to=somewhere")
    assert _compiler_options() is None
