from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any, get_args, get_type_hints

import jax
import numpy as np
import pytest

from actors import rendering, tasks
from actors.evaluate import evaluation_seeds
from common.config import Config, EnvConfig, SafetyConfig, WorldModelConfig
from common.config_checks import OF_LATENT, unread
from common.configuration import load, merge, presets
from common.types import EnvSpec, UserError, replay_spec
from deploy import wiring
from deploy.train import check
from learner.scene import SceneModel
from learner.world_model import WorldModel
from tests.deploy.conftest import TINY
from tests.learner.tiny import filled
from tests.synthetic import LineEnv, line_spec

GOAL, VELOCITY = "SafetyPointGoal1-v0", "SafetyHopperVelocity-v1"


def batch_of(cfg: Config, spec: EnvSpec) -> dict[str, jax.ShapeDtypeStruct]:
    lead = (cfg.learner.batch_size, cfg.learner.batch_length)
    return {
        name: jax.ShapeDtypeStruct((*lead, *array.shape), array.dtype)
        for name, array in replay_spec(spec).items()
    }


def test_every_name_of_the_configuration_is_wired():
    safety, config = get_type_hints(SafetyConfig), get_type_hints(Config)
    assert set(wiring.CONSTRAINTS) == set(get_args(safety["constraint"]))
    assert set(wiring.COST_MODELS) == set(get_args(safety["cost_model"]))
    assert set(wiring.POLICIES) == set(get_args(config["policy"]))
    assert get_args(get_type_hints(EnvConfig)["observation"]) == tasks.OBSERVATIONS


@pytest.mark.parametrize("method", presets("method"))
@pytest.mark.parametrize("size", presets("size"))
def test_every_method_trains_and_acts_on_its_parameters(method, size):
    """In shapes only: a step keeps the state as it is, and what is broadcast fits the policy."""
    cfg = load(method, size, GOAL)
    spec = wiring.spec_of(cfg)
    train = wiring.train_step(cfg, spec)
    state = jax.eval_shape(train.init, 0)
    after_step, metrics = jax.eval_shape(train.step, state, batch_of(cfg, spec))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after_step) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    # A restored state has no weak types: a step that began with some would be compiled again after it.
    assert not any(x.weak_type for x in jax.tree.leaves((state, after_step)))
    assert all(value.shape == () for value in metrics.values())
    params = jax.eval_shape(train.acting, state)
    for explore in (True, False):
        policy = wiring.policy(cfg, spec, explore=explore)
        obs = {name: np.zeros((3, *array.shape), array.dtype) for name, array in spec.obs.items()}
        carry = policy.init(3)
        after, actions, stats = jax.eval_shape(
            policy.act, params, carry, obs, np.ones(3, bool), jax.random.PRNGKey(0)
        )
        assert (actions.shape, actions.dtype) == ((3, spec.action_size), np.float32)
        assert all(value.shape == () for value in jax.tree.leaves(stats))
        assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, carry)


def test_published_parameters_act_the_same_and_hold_no_module():
    cfg = merge(load("osrp_lag", "nano", GOAL), TINY, "tiny")
    spec = wiring.spec_of(cfg)
    train = wiring.train_step(cfg, spec)
    params = train.acting(filled(lambda: train.init(0)))
    leaves = pickle.loads(pickle.dumps(jax.device_get(jax.tree.leaves(params))))
    assert all(type(leaf) is np.ndarray for leaf in leaves)
    whole, flat = (make(cfg, spec, explore=True) for make in (wiring.policy, wiring.published_policy))
    rng = np.random.default_rng(0)
    obs = {name: rng.normal(size=(2, *array.shape)).astype("float32") for name, array in spec.obs.items()}
    arguments = (whole.init(2), obs, np.ones(2, bool), jax.random.PRNGKey(0))
    for one, other in zip(
        jax.tree.leaves(jax.jit(whole.act)(params, *arguments)),
        jax.tree.leaves(jax.jit(flat.act)(leaves, *arguments)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", sorted(set(presets("method")) - {"osrp_vector", "osrp_tracked"}))
def test_methods_that_learn_costs_work_without_coordinates(method):
    cfg = load(method, "nano", VELOCITY)
    spec = wiring.spec_of(cfg)
    assert (spec.task, spec.action_repeat, dict(spec.slices)) == (VELOCITY, 2, {})
    train = wiring.train_step(cfg, spec)
    jax.eval_shape(train.step, jax.eval_shape(train.init, 0), batch_of(cfg, spec))


@pytest.mark.skipif(rendering.gl_backend() is None, reason="no headless OpenGL here")
def test_the_configured_cameras_are_observed():
    env = {"env": {"observation": "vision", "cameras": "vision_back"}, "actors": {"envs": 1}}
    cfg = merge(load("bsrp_lag", "nano", GOAL), env, "test")
    spec = wiring.spec_of(cfg)
    assert list(spec.obs) == ["image"]
    assert wiring.evaluation_env(cfg, 0, 1).spec == spec
    wrong = merge(cfg, {"env": {"cameras": "vision_front"}}, "test")
    with pytest.raises(UserError, match="no camera 'vision_front'"):
        wiring.spec_of(wrong)


def test_vision_without_opengl_is_refused(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    with pytest.raises(UserError, match="apt-get install libegl1"):
        wiring.spec_of(merge(load("bsrp_lag", "nano", GOAL), {"env": {"observation": "vision"}}, "test"))


def test_a_scene_may_have_no_hazards():
    """Level 0 of a Goal task: nothing costs, and the goal is tracked all the same."""
    cfg = load(None, "nano", "SafetyPointGoal0-v0")
    spec = wiring.spec_of(cfg)
    assert cfg.safety.cost_model == "tracked"
    train = wiring.train_step(cfg, spec)
    jax.eval_shape(train.step, jax.eval_shape(train.init, 0), batch_of(cfg, spec))


def test_a_latent_is_learned_where_cameras_see():
    for observation, kind in (("coordinates", SceneModel), ("vision+coordinates", WorldModel)):
        cfg = load("osrp_tracked", "nano", GOAL, observation=observation)
        train = wiring.train_step(cfg, wiring.spec_of(load("osrp_tracked", "nano", GOAL)))
        assert isinstance(jax.eval_shape(train.init, 0).model, kind)


def test_what_is_said_to_have_no_effect_without_a_latent_is_what_nothing_reads():
    read = set()

    class Watched(WorldModelConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    cfg = load("osrp_tracked", "nano", GOAL)
    model = Watched(**dataclasses.asdict(cfg.world_model))
    read.clear()
    cfg = dataclasses.replace(cfg, world_model=model)
    spec = wiring.spec_of(cfg)
    train = wiring.train_step(cfg, spec)
    state = jax.eval_shape(train.init, 0)
    jax.eval_shape(train.step, state, batch_of(cfg, spec))
    wiring.policy(cfg, spec, explore=True)
    assert {field.name for field in dataclasses.fields(model)} - read == set(OF_LATENT)


def test_a_change_that_nothing_reads_is_named():
    changes = {"world_model": {"deter": 7, "units": 9, "lr": 1e-3}}
    assert unread(merge(load("osrp_tracked", task=GOAL), changes, "test")) == [
        "world_model.deter",
        "world_model.units",
    ]
    assert unread(merge(load("osrp", task=GOAL), changes, "test")) == []
    assert unread(load("osrp_tracked", "small", GOAL)) == []


def test_more_than_this_machine_can_hold_is_refused():
    wide = {"world_model": {"deter": 2**16, "units": 2**16}}
    with pytest.raises(UserError, match=r"would take [\d,]+ GB.*smaller --size"):
        check(merge(load("osrp_vector", task=GOAL), wide, "test"))


def test_hazards_must_be_observed_to_be_counted():
    cfg = merge(
        load("dreamerv3", "nano", "SafetyPointGoal0-v0"), {"safety": {"cost_model": "geometric"}}, "test"
    )
    with pytest.raises(UserError, match=r"SafetyPointGoal0-v0 observes no hazards.*cost_model learned"):
        wiring.train_step(cfg, wiring.spec_of(cfg))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the training environments that are built."""
    seeds: list[int] = []

    class Capturing(LineEnv):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            seeds.append(args[4])

    monkeypatch.setattr(wiring, "env_spec", line_spec)
    monkeypatch.setattr(wiring, "SafetyVectorEnv", Capturing)
    return seeds


def test_every_actor_and_every_life_of_it_sees_layouts_of_its_own(captured):
    lives = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 5_000)))
    for seed, actor, life in lives:
        cfg = merge(load("bsrp_lag"), {"seed": seed}, "test")
        options: dict[str, Any] = {"actor": actor, "life": life, "prefill": 0}
        rollout = wiring.rollout(cfg, wiring.spec_of(cfg), source=None, writers=[], **options)  # pyright: ignore
        rollout.close()
    assert len(set(captured)) == len(lives)
    again = load("bsrp_lag")
    wiring.rollout(again, wiring.spec_of(again), None, [], actor=0, life=0, prefill=0)  # pyright: ignore
    assert captured[-1] == captured[0]  # reproducible


def test_evaluation_plays_the_held_out_layouts(captured):
    cfg = load()
    env = wiring.evaluation_env(cfg, seed=3, episodes=4)
    assert env.num_envs == 4
    assert env._seeds == evaluation_seeds(3, 4)  # pyright: ignore[reportAttributeAccessIssue]
    assert not captured
