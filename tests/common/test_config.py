from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common import config, configuration, yaml_file
from common.config import Config
from common.config_checks import check
from common.configuration import dump, flatten, from_dict, load, merge, presets, to_dict
from common.types import UserError
from common.yaml_file import read_yaml

METHODS, SIZES = presets("method"), presets("size")
GOAL, VELOCITY = "SafetyPointGoal1-v0", "SafetyHopperVelocity-v1"


def with_changes(**changes: Any) -> Config:
    return merge(Config(), changes, "test")


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets in which the layer that sets `units` last can be told by its value."""
    monkeypatch.setattr(configuration, "CONFIG_DIR", tmp_path)
    files = {
        "default.yaml": {"seed": 1, "env_steps": 1, "world_model": {"units": 1, "deter": 1, "stoch": 1}},
        "methods/m.yaml": {
            "world_model": {"units": 2, "deter": 2},
            "sizes": {"s": {"world_model": {"units": 4}}},
            "observations": {
                "coordinates": {
                    "world_model": {"units": 6},
                    "sizes": {"s": {"world_model": {"units": 7}}},
                }
            },
        },
        "methods/plain.yaml": {"world_model": {"units": 2}},
        "sizes/s.yaml": {"world_model": {"units": 3, "stoch": 3}},
        "sizes/other.yaml": {"world_model": {"stoch": 9}},
        "tasks/t.yaml": {"match": ["Safety*Goal?-v0"], "world_model": {"units": 5}},
        "tasks/c.yaml": {"match": ["SafetyCar*"], "env": {"observation": "coordinates"}},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(content))
    return tmp_path


def test_later_layers_win(layers):
    (layers / "file.yaml").write_text("world_model: {units: 8}")
    (layers / "last.yaml").write_text("world_model: {units: 9}")

    def units(method: str, size: str, task: str, *files: str) -> int:
        return load(method, size, task, [layers / name for name in files]).world_model.units

    assert units("plain", "other", "Other") == 2  # the method over the default
    assert units("plain", "s", "Other") == 3  # the size over the method
    assert units("plain", "s", "SafetyPointGoal1-v0") == 5  # the task over the size
    assert units("m", "s", "SafetyPointGoal1-v0") == 4  # the method's entry for the size over all three
    assert units("m", "other", "Other") == 2  # which is for that size only
    assert units("m", "other", "SafetyCarGoal1-v0") == 6  # the method's entry for the task's observation
    assert units("m", "s", "SafetyCarGoal1-v0") == 7  # and that for both
    assert units("m", "s", "SafetyCarGoal1-v0", "file.yaml") == 8
    assert units("m", "s", "SafetyCarGoal1-v0", "file.yaml", "last.yaml") == 9
    composed = load("m", "s", "Other").world_model
    assert (composed.deter, composed.stoch) == (2, 3)  # what later layers leave alone stays
    assert load("m", "s", "Other").seed == 1


def test_the_observation_that_counts_is_the_one_chosen_last(layers):
    (layers / "file.yaml").write_text("env: {observation: lidar}")
    assert load("m", "s", "SafetyCarGoal1-v0", [layers / "file.yaml"]).world_model.units == 4
    chosen = load("m", "other", "Other", observation="coordinates")
    assert (chosen.world_model.units, chosen.env.observation) == (6, "coordinates")


def test_a_file_may_choose_the_presets_and_a_flag_wins(layers):
    (layers / "file.yaml").write_text("{method: plain, size: other, task: Other}")
    chosen = load(files=[layers / "file.yaml"])
    assert (chosen.method, chosen.size, chosen.task) == ("plain", "other", "Other")
    assert (chosen.world_model.units, chosen.world_model.stoch) == (2, 9)
    chosen = load("m", "s", files=[layers / "file.yaml"])
    assert (chosen.method, chosen.size, chosen.task) == ("m", "s", "Other")
    assert chosen.world_model.units == 4


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ({"sede": 3}, "file: there is no setting `sede` (did you mean `seed`?)"),
        ({"learner": {"batchsize": 3}}, "no setting `learner.batchsize` (did you mean `batch_size`?)"),
        ({"safety": {"pid": {"kpp": 1}}}, "no setting `safety.pid.kpp` (did you mean `kp`?)"),
        ({"qwertz": 1}, "there is no setting `qwertz`"),
        ({3: 1}, "there is no setting `3`"),
        ({"seed": "three"}, "`seed` must be a int, not 'three'"),
        ({"seed": 1.5}, "`seed` must be a int, not 1.5"),
        ({"seed": True}, "`seed` must be a int, not True"),
        ({"seed": None}, "`seed` must be a int, not None"),
        ({"task": 3}, "`task` must be a str, not 3"),
        ({"world_model": {"lr": "fast"}}, "`world_model.lr` must be a float, not 'fast'"),
        ({"replay": {"checkpoint": 1}}, "`replay.checkpoint` must be a bool, not 1"),
        ({"policy": "planer"}, "one of actor, planner, not 'planer' (did you mean `planner`?)"),
        ({"policy": ["actor"]}, "`policy` must be one of actor, planner"),
        ({"logging": {"wandb": True}}, "`logging.wandb` must be one of online, offline, off, not True"),
        ({"env": 5}, "`env` is a group of settings, not the value 5"),
        ({"env": None}, "`env` is a group of settings"),
    ],
)
def test_a_wrong_layer_is_refused_with_its_place_and_the_nearest_name(layer, sentence):
    with pytest.raises(UserError) as error:
        merge(Config(), layer, "file")
    assert sentence in str(error.value)
    assert str(error.value).startswith("file: ")


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(
        "env_steps: 1e6\nseed: 1_000\nworld_model: {lr: 1e-3, eps: 1E-8, clip: 5, free_nats: .5}\n"
        "safety: {augmented: {cap: .inf, growth: +1e-5}}\nlogging: {wandb: off}\n"
    )
    config = merge(Config(), read_yaml(path), str(path))
    assert (config.env_steps, config.seed) == (1_000_000, 1000)
    assert isinstance(config.env_steps, int)
    model = config.world_model
    assert (model.lr, model.eps, model.clip, model.free_nats) == (1e-3, 1e-8, 5.0, 0.5)
    assert isinstance(model.clip, float)
    assert (config.safety.augmented.cap, config.safety.augmented.growth) == (float("inf"), 1e-5)
    assert config.logging.wandb == "off"


def test_names_that_look_like_numbers_stay_names(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("{a: e5, b: 1e, c: v1.0, d: 1-2, e: ., f: -}")
    assert list(read_yaml(path).values()) == ["e5", "1e", "v1.0", "1-2", ".", "-"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1, 2", "cannot be read as YAML"),
        ("\tseed: 1", "cannot be read as YAML"),
        ("- seed\n- 1", "must hold `name: value` lines, not a list"),
        ("seed 1", "must hold `name: value` lines, not a str"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        ("learner: {prefill: 1}\nlearner: {batch_size: 2}", "`learner` stands twice in one group"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_bad_files_are_refused_by_name_in_one_line(tmp_path, content, sentence):
    path = tmp_path / "file.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match=r"there is no configuration file .*nope\.yaml"):
        read_yaml(tmp_path / "nope.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_passes_the_check_and_survives_its_file(tmp_path, method, size):
    config = load(method, size, GOAL)
    assert (config.method, config.size, config.task) == (method, size, GOAL)
    check(config)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert from_dict(read_yaml(path), str(path)) == config
    # A run's file as `--config` gives the same run again.
    assert load(files=[path]) == config


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"osrp_vector", "osrp_tracked"}))
@pytest.mark.parametrize("size", SIZES)
def test_methods_that_learn_costs_need_no_coordinates(method, size):
    for task in (VELOCITY, "SafetyDoggoButton2-v0", "SafetyRacecarCircle1-v0"):
        config = load(method, size, task)
        assert config.env.observation == ("vision" if (method, size) in PAPER_VISION else "lidar")
        check(config)
    check(load(method, size, GOAL, observation="lidar"))


PAPER_VISION = [(method, "paper") for method in ("bsrp_lag", "osrp", "osrp_lag", "dreamerv3")]


@pytest.mark.parametrize(
    ("method", "observation", "figures"),
    [
        # policy, action repeat, cost limit, deter, units, stoch = classes, encoder, mixture, temperature
        ("bsrp_lag", "vision", ("actor", 4, 2.0, 512, 512, 48, (5, 1024), None, None)),
        ("osrp", "vision", ("planner", 5, 2.0, 512, 512, 48, (5, 1024), 0.0, 0.0)),
        ("osrp_lag", "vision", ("planner", 4, 2.0, 512, 512, 48, (5, 1024), 0.0, 0.0)),
        ("osrp_vector", "coordinates", ("planner", 5, 0.0, 256, 256, 16, (3, 256), 0.05, 0.0)),
        ("dreamerv3", "vision", ("actor", 2, None, 512, 512, 48, (5, 1024), None, None)),
        ("dreamerv3", "lidar", ("actor", 5, None, 512, 512, 32, (5, 1024), None, None)),
        ("cem", "coordinates", ("planner", 5, None, 512, 512, 48, (5, 1024), 0.05, 10.0)),
    ],
)
def test_paper_presets_hold_the_published_figures(method, observation, figures):
    """ALGORITHM, section 4; None where the method has no such figure."""
    chosen = None if observation in ("vision", "coordinates") else observation
    config = load(method, "paper", GOAL, observation=chosen)
    model, planner = config.world_model, config.planner
    found = (
        config.policy,
        config.env.action_repeat,
        config.safety.cost_limit,
        model.deter,
        model.units,
        model.stoch,
        (model.encoder_layers, model.encoder_units),
        planner.mixture_coef,
        planner.temperature,
    )
    assert config.env.observation == observation
    assert [a for a, b in zip(found, figures, strict=True) if b is not None] == [
        b for b in figures if b is not None
    ]
    assert model.classes == model.stoch
    assert (model.head_layers, model.cnn_depth, config.learner.train_ratio) == (2, 32, 512)
    assert (config.learner.batch_size, config.learner.batch_length) == (16, 64)
    assert (planner.samples, planner.elites, planner.iterations, planner.horizon) == (500, 50, 6, 15)


def test_a_task_may_name_its_default_method(tmp_path):
    assert load().method == "osrp_tracked"
    assert load(task="SafetyPointButton1-v0").method == load(task=VELOCITY).method == "bsrp_pid"
    assert load(method="osrp", task=GOAL).method == "osrp"
    (tmp_path / "file.yaml").write_text("method: bsrp_pid")  # although it is the general default
    assert load(task=GOAL, files=[tmp_path / "file.yaml"]).method == "bsrp_pid"


def test_task_presets():
    assert load("osrp", "nano", VELOCITY).env.action_repeat == 2
    assert load("osrp", "nano", GOAL).env.action_repeat == 5
    assert load("osrp", "nano", "SafetyDoggoGoal1-v0").env.observation == "lidar"


@given(st.floats(min_value=1e-30, max_value=1e30), st.integers(min_value=0, max_value=10**12))
def test_every_number_survives_the_file(number, whole):
    config = with_changes(world_model={"lr": number}, seed=whole)
    assert from_dict(yaml.load(dump(config), yaml_file._Loader), "file") == config


def test_unknown_presets_are_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"there is no method `bsrp_pit` \(did you mean `bsrp_pid`\?\)"):
        load("bsrp_pit")
    with pytest.raises(UserError, match=r"there is no size `nanno` \(did you mean `nano`\?\); sizes: nano"):
        load(size="nanno")
    assert load(task="Nowhere").task == "Nowhere"  # the environment knows which exist


COORDINATES = {"observation": "coordinates"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"planner": {"elites": 501}}, "planner.elites (501) must not exceed planner.samples (500)"),
        ({"replay": {"capacity": 1023}}, "a batch (16 x 64 steps) does not fit replay.capacity (1023)"),
        ({"learner": {"batch_length": 10**6, "batch_size": 2}}, "does not fit replay.capacity"),
        ({"replay": {"stride": 65}}, "replay.stride (65) must not exceed learner.batch_length (64)"),
        ({"learner": {"train_ratio": 0.01}}, "learner.train_ratio (0.01) is too small"),
        ({"safety": {"cost_model": "none", "constraint": "pid"}}, "constraint pid needs costs"),
        ({"safety": {"cost_model": "none", "constraint": "augmented"}}, "constraint augmented needs costs"),
        (
            {"policy": "planner", "safety": {"cost_model": "none", "penalty": "pid"}},
            "penalty pid needs costs",
        ),
        ({"safety": {"penalty": "pid"}}, "penalty shapes plans"),
        (
            {"policy": "planner", "safety": {"constraint": "pid", "penalty": "pid"}},
            "would move one multiplier",
        ),
        ({"safety": {"cost_model": "geometric"}}, "geometric reads hazard positions"),
        (
            {"env": {"observation": "vision"}, "safety": {"cost_model": "tracked"}},
            "tracked reads where things are",
        ),
        ({"world_model": {"latent": False}}, "it needs safety.cost_model tracked"),
        ({"planner": {"correlation": 1.5}}, "`planner.correlation` must be at most 1"),
        ({"world_model": {"deter": 70_000}}, "`world_model.deter` is too large: 70000; at most 65,536"),
        (
            {"env": {"observation": "vision+lidar"}, "safety": {"cost_model": "geometric"}},
            "geometric reads hazard positions",
        ),
        ({"env_steps": 0}, "`env_steps` must be greater than 0, not 0"),
        ({"env_steps": -1}, "`env_steps` must be greater than 0, not -1"),
        ({"seed": -1}, "`seed` must be at least 0, not -1"),
        ({"actors": {"count": 0}}, "`actors.count` must be greater than 0"),
        ({"env": {"action_repeat": 0}}, "`env.action_repeat` must be greater than 0"),
        ({"learner": {"batch_size": 0}}, "`learner.batch_size` must be greater than 0"),
        ({"evaluation": {"every": -1}}, "`evaluation.every` must be at least 0"),
        ({"world_model": {"lr": float("nan")}}, "`world_model.lr` must be greater than 0, not nan"),
        ({"world_model": {"lr": float("inf")}}, "`world_model.lr` must be finite"),
        ({"behavior": {"gamma": 1.1}}, "`behavior.gamma` must be at most 1, not 1.1"),
        ({"behavior": {"lambda_": 1.1}}, "`behavior.lambda_` must be at most 1"),
        ({"behavior": {"slow_rate": 2.0}}, "`behavior.slow_rate` must be at most 1"),
        ({"planner": {"momentum": 1.5}}, "`planner.momentum` must be at most 1"),
        ({"world_model": {"unimix": 1.5}}, "`world_model.unimix` must be at most 1"),
        ({"safety": {"pid": {"cost_decay": 1.5}}}, "`safety.pid.cost_decay` must be at most 1"),
        ({"safety": {"pid": {"kp": -0.1}}}, "`safety.pid.kp` must be at least 0"),
        ({"replay": {"port": 70_000}}, "`replay.port` must be a port number"),
        ({"replay": {"port": 65_535, "shards": 2}}, "`replay.port` must be a port number"),
        ({"replay": {"shards": 2}, "actors": {"count": 1}}, "replay.shards (2) must not exceed actors.count"),
        ({"replay": {"shards": 3}, "actors": {"count": 3}}, "must be a multiple of replay.shards (3)"),
        ({"inference": {"max_batch": 7}, "actors": {"envs": 8}}, "inference.max_batch (7) must not be below"),
        ({"inference": {"max_wait_ms": -1.0}}, "`inference.max_wait_ms` must be at least 0"),
        ({"actors": {"max_staleness": -1}}, "`actors.max_staleness` must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused(changes, sentence):
    with pytest.raises(UserError) as error:
        check(with_changes(**changes))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"planner": {"elites": 500}},
        {"replay": {"capacity": 1024, "stride": 64}},
        {"policy": "planner"},
        {"env": COORDINATES, "safety": {"cost_model": "geometric", "constraint": "augmented"}},
        {"env": {"observation": "vision+coordinates"}, "safety": {"cost_model": "geometric"}},
        {"env": COORDINATES, "safety": {"cost_model": "tracked", "constraint": "pid"}},
        {"safety": {"augmented": {"cap": float("inf")}, "cost_limit": 0.0}},
        {"seed": 0, "evaluation": {"every": 0}, "learner": {"prefill": 0}, "behavior": {"entropy": 0.0}},
        {"behavior": {"gamma": 1.0, "lambda_": 1.0}, "replay": {"port": 65_535}},
    ],
)
def test_what_can_work_is_not(changes):
    check(with_changes(**changes))


def test_flatten_names_every_leaf_once():
    flat = flatten(to_dict(Config()))
    assert flat["safety.pid.kp"] == Config().safety.pid.kp
    assert flat["method"] == Config().method
    assert not any(isinstance(value, dict) for value in flat.values())


def test_the_schema_is_frozen_and_every_field_is_explained():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    source = Path(config.__file__).read_text()
    for name, value in flatten(to_dict(Config())).items():
        line = next(i for i, text in enumerate(source.splitlines()) if f"    {name.split('.')[-1]}: " in text)
        assert '"""' in source.splitlines()[line + 1], f"{name} ({value!r}) has no explanation"
