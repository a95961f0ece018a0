"""Published checkpoints become ours, play, and are trained further."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common import checkpoint, versions
from common.types import EnvSpec, UserError
from deploy import importing, warm_start, wiring
from deploy import run_dir as runs
from deploy.importing import Wanted, import_checkpoint
from deploy.inline import InlineWorkers
from deploy.train import train
from learner.reference_checkpoint import read
from learner.train_step import TrainState
from tests import published
from tests.deploy.test_cli import cli, refused  # noqa: F401
from tests.parity import recorded

TASK = "SafetyPointGoal1-v0"
AUTHORS = Path(__file__).parents[1] / "learner" / "data" / "osrp_vector.ckpt"
METHODS = ("bsrp_lag", "osrp", "osrp_lag", "osrp_vector", "dreamerv3")
RECORDED = ("bsrp_lag", "osrp_lag", "osrp_vector")

# What makes a run of an imported agent short; none of it has a shape.
SHORT = """
env: {action_repeat: 20}
planner: {samples: 8, elites: 2, iterations: 1, horizon: 2}
behavior: {horizon: 2, imagine_starts: 4}
learner: {batch_size: 2, batch_length: 8, train_ratio: 8.0, prefill: 40}
replay: {capacity: 4000, stride: 2}
actors: {envs: 2, slice_seconds: 0.3}
evaluation: {every: 0, final_episodes: 1}
logging: {tensorboard: false, live: false}
backend: inline
"""


def spec_of(cfg: Any) -> EnvSpec:
    """What the recorded agents saw and did; no OpenGL is needed to describe it."""
    obs = recorded._OBS["osrp_vector" if cfg.env.observation == "coordinates" else "bsrp_lag"]
    return EnvSpec(cfg.task, obs, 2, cfg.env.action_repeat, 1000, {"hazards": (9, 25)})


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "spec_of", spec_of)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    return path


def restored(path: Path) -> tuple[TrainState, dict[str, Any]]:
    """The arrays of one of our checkpoints, and what is written beside them."""
    meta = checkpoint.read_meta(path)
    cfg = runs.config_of(path, meta)
    like = jax.eval_shape(wiring.train_step(cfg, wiring.spec_of(cfg)).init, 0)
    return checkpoint.restore(path, like).tree, meta


def imported(tmp_path: Path, method: str, **changes: Any) -> Path:
    source = published.write(tmp_path / f"{method}.ckpt", method)
    return import_checkpoint(source, Wanted(method, TASK, **changes), tmp_path / f"{method}-imported")


def assert_same_numbers(ours: Any, theirs: Any) -> None:
    """Every array, by its place; settings that shape none may differ."""
    flat = [
        {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(t)}
        for t in (ours, theirs)
    ]
    assert flat[0].keys() == flat[1].keys()
    for path, value in flat[1].items():
        np.testing.assert_array_equal(flat[0][path], value, err_msg=path)


# --- import -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_imports_and_again_equal(tmp_path, described, method):
    state, meta = restored(imported(tmp_path, method))
    again = import_checkpoint(tmp_path / f"{method}.ckpt", Wanted(method, TASK), tmp_path / "again")
    assert_same_numbers(restored(again)[0], state)

    repeat = meta["config"]["env"]["action_repeat"]
    updates = int(published.variables(method)["agent/task_behavior/critic/updates/value"])
    assert meta["env_steps"] == published.STEP * repeat  # the authors count decisions
    assert meta["imported_with"] == versions.here()
    assert "versions" not in meta  # nobody knows what it was trained with
    assert meta["counters"]["agent_steps"] == published.STEP
    assert meta["updates"] == meta["counters"]["updates"] == int(state.updates) == updates
    assert (state.cost_critic is not None) == (method in ("bsrp_lag", "osrp", "osrp_lag"))
    for opt, params in ((state.model_opt, state.model), (state.actor_opt, state.actor)):
        (adam,) = (part for part in jax.tree.leaves(opt, is_leaf=_is_adam) if _is_adam(part))
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
        assert adam.count == 7
        np.testing.assert_array_equal(adam.mu, (0.5 * flat).astype(np.float32))
        np.testing.assert_array_equal(adam.nu, np.square(flat))


def _is_adam(value: Any) -> bool:
    return hasattr(value, "mu")


@pytest.mark.parametrize("method", RECORDED)
def test_imported_agents_are_those_whose_every_number_is_compared(tmp_path, described, method):
    """tests/parity reproduces what these agents did, with the very same arrays and sizes."""
    path = imported(tmp_path, method)
    system = recorded.system(method)
    ours, meta = restored(path)
    names = ("model", "actor", "critic", "cost_critic", "moments", "cost_moments")
    for name in names:
        assert_same_numbers(getattr(ours, name), getattr(system.state, name))
    if method == "bsrp_lag":
        assert_same_numbers(ours.multiplier, system.state.multiplier)
    cfg = runs.config_of(path, meta)
    assert cfg.safety == system.cfg.safety
    assert cfg.world_model.stoch == system.cfg.world_model.stoch


def test_the_actor_of_an_imported_agent_acts_as_recorded(tmp_path, described):
    """BSRP-Lag's ten decisions in training, across an episode's border, with pinned noise."""
    path = imported(tmp_path, "bsrp_lag")
    state, meta = restored(path)
    cfg = runs.config_of(path, meta)
    spec = spec_of(cfg)
    policy = wiring.policy(cfg, spec, explore=True)
    params = wiring.train_step(cfg, spec).acting(state)
    run = recorded.group(recorded.read("bsrp_lag"), "policy")
    count = run["obs/is_first"].shape[1]
    carry, act = policy.init(count), recorded.pin(policy.act)
    for t, expected in enumerate(run["out/action"]):
        obs = {name: run[f"obs/{name}"][t] for name in ("image", "image2")}
        carry, actions, _ = act(params, carry, obs, run["obs/is_first"][t], jax.random.PRNGKey(0))
        # The published policy leaves it to the environment to clip.
        recorded.assert_close(actions, np.clip(expected, -1.0, 1.0))


# --- what is refused ----------------------------------------------------------------------------


def refusal(path: Path, wanted: Wanted, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_checkpoint(path, wanted, out)
    assert not out.exists() or not list(out.glob("**/manifest.json"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "given", "right"),
    [
        ("osrp_vector", "bsrp_lag", "osrp_vector"),
        ("osrp_vector", "osrp", "osrp_vector"),
        ("bsrp_lag", "osrp_lag", "bsrp_lag"),
        ("bsrp_lag", "bsrp_pid", "bsrp_lag"),
        ("osrp_lag", "bsrp_lag", "osrp"),
        ("osrp_lag", "osrp_vector", "osrp"),
        ("dreamerv3", "bsrp_lag", "dreamerv3"),
        ("dreamerv3", "cem", "dreamerv3"),
    ],
)
def test_another_method_is_refused_by_the_right_one(tmp_path, described, method, given, right):
    source = published.write(tmp_path / "some.ckpt", method)
    sentence = refusal(source, Wanted(given, TASK), tmp_path / "out")
    assert f"not of the method {given}" in sentence
    assert sentence.endswith(f"give --method {right}")


def test_another_task_is_refused(tmp_path, described, monkeypatch):
    wanted, out = Wanted("osrp_vector", TASK), tmp_path / "out"
    assert "no method `osrp_vectr`" in refusal(AUTHORS, Wanted("osrp_vectr", TASK), out)
    sentence = refusal(AUTHORS, Wanted("osrp_vector", TASK, observation="vision"), out)
    assert "observes 29 numbers, but" in sentence
    assert "shows 2 images of 64 x 64 pixels" in sentence
    source = published.write(tmp_path / "vision.ckpt", "dreamerv3")
    sentence = refusal(source, Wanted("dreamerv3", TASK, observation="coordinates"), out)
    assert "observes 2 images of 64 x 64 pixels, but" in sentence
    monkeypatch.setattr(wiring, "spec_of", lambda cfg: dataclasses.replace(spec_of(cfg), action_size=8))
    assert "acts with 2 numbers, but SafetyPointGoal1-v0 takes 8" in refusal(AUTHORS, wanted, out)


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda agent: agent.pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda agent: agent.update({name: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("agent/wm/rssm/gru/norm/bias"), "missing: agent/wm/rssm/gru/norm/bias"),
        (drop("agent/wm/rssm/initial"), "agent/wm/rssm/initial is missing"),
        (drop("agent/task_behavior/critic/slow/h1/kernel"), "missing: agent/task_behavior/critic/slow/h1"),
        (drop("agent/wm/model_opt/state"), "missing: agent/wm/model_opt/state"),
        (drop("agent/wm/model_opt/step/value"), "missing: agent/wm/model_opt/step/value"),
        (put("agent/wm/extra/kernel", np.ones(3, np.float32)), "no place in this method: agent/wm/extra"),
        (put("agent/wm/cont/dist_out/out/bias", np.ones(2, np.float32)), "agent/wm/cont/dist_out/out/bias"),
        (put("agent/wm/rew/h5/kernel", np.ones((2, 2), np.float32)), "agent/wm/rew/h5/kernel"),
        (put("agent/wm/rssm/img_stats/kernel", np.ones(3, np.float32)), "agent/wm/rssm/img_stats/kernel"),
        (put("agent/wm/rssm/initial", np.ones(31, np.float32)), "agent/wm/rssm"),
        (put("agent/wm/rssm/img_in/kernel", np.ones((16, 16), np.float32)), "agent/wm/rssm/img_in"),
    ],
)  # fmt: skip
def test_a_variable_without_its_place_is_named(tmp_path, described, change, named):
    source = published.write(tmp_path / "some.ckpt", "osrp_vector", change)
    assert named in refusal(source, Wanted("osrp_vector", TASK), tmp_path / "out")


def test_the_product_of_categoricals_and_classes_is_split(tmp_path, described, short):
    def split(**wanted: Any) -> tuple[int, int]:
        asked = Wanted("osrp_vector", TASK, **wanted)
        path = import_checkpoint(AUTHORS, asked, tmp_path / str(sorted(wanted)))
        model = checkpoint.read_meta(path)["config"]["world_model"]
        return model["stoch"], model["classes"]

    assert split() == (4, 4)
    assert split(stoch=8) == (8, 2)
    assert split(classes=8) == (2, 8)
    short.write_text("world_model: {stoch: 2, classes: 8}")
    assert split(files=[short]) == (2, 8)
    for stoch, classes, named in [(3, None, "16"), (4, 5, "make 20"), (0, None, "16"), (-4, -4, "16")]:
        wrong = Wanted("osrp_vector", TASK, stoch=stoch, classes=classes)
        assert named in refusal(AUTHORS, wrong, tmp_path / "out")
    short.write_text("world_model: {deter: 64}")
    sentence = refusal(AUTHORS, Wanted("osrp_vector", TASK, files=[short]), tmp_path / "out")
    assert "`world_model.deter` is 64, but the checkpoint has 32" in sentence
    odd = read(AUTHORS).variables
    sizes = importing.reference_sizes.sizes(odd)
    cfg = importing.load_config(Wanted("osrp_vector", TASK))
    with pytest.raises(UserError, match="give --stoch and --classes"):
        importing._split(sizes.latent + 1, cfg, Wanted("osrp_vector", TASK))


# --- what the result is good for ----------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path, cli: Callable, short: Path) -> Path:  # noqa: F811
    """The directory of an imported agent with a short configuration, on the real task."""
    source = published.write(tmp_path / "some.ckpt", "osrp_vector")
    options = ("--method", "osrp_vector", "--task", TASK, "--config", short, "--out", tmp_path / "ours")
    result = cli("import", source, *options)
    assert (result.code, result.err) == (0, "")
    assert str(tmp_path / "ours" / "step_") in result.out
    return tmp_path / "ours"


def test_an_imported_agent_is_evaluated(ours, cli, refused):  # noqa: F811
    result = cli("eval", ours, "--episodes", 1, "--json")
    assert result.code == 0
    summary = json.loads(result.out)
    assert summary["method"] == "osrp_vector"
    assert summary["env_steps"] == published.STEP * 20
    assert summary["length"] == 1000
    assert "exists already" in refused(
        "import", AUTHORS, "--method", "osrp_vector", "--task", TASK, "--out", ours
    )
    assert "required" in refused("import", AUTHORS)
    assert "does not exist" in refused(
        "import", "absent.ckpt", "--method", "osrp_vector", "--task", TASK, "--out", "out"
    )


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Random steps of every actor that is started."""
    seen: list[int] = []
    start = InlineWorkers.actor

    def actor(self: InlineWorkers, index: int, life: int, prefill: int) -> Any:
        seen.append(prefill)
        return start(self, index, life, prefill)

    monkeypatch.setattr(InlineWorkers, "actor", actor)
    return seen


def adam_count(run: Path) -> tuple[int, int]:
    """(steps of the optimizer, updates of the run) in a run's newest checkpoint."""
    state, meta = restored(checkpoint.find_checkpoint(run))
    (adam,) = (part for part in jax.tree.leaves(state.model_opt, is_leaf=_is_adam) if _is_adam(part))
    return int(adam.count), meta["counters"]["updates"]


def test_an_imported_agent_is_trained_further_and_resumed(ours, cli, tmp_path, prefills):  # noqa: F811
    run = tmp_path / "run"
    result = cli("train", "--from-checkpoint", ours, "--env-steps", 2_000, "--run-dir", run)
    assert result.code == 0, result.err
    count, updates = adam_count(run)
    assert updates > 0
    assert count == 7 + updates  # the optimizer went on, the run's own counters began anew
    assert prefills == [0]  # the loaded policy acts from the start
    start = warm_start.read(run)
    assert start is not None
    assert start.checkpoint.parent == ours

    shutil.rmtree(ours)  # a resumed run has checkpoints of its own
    result = cli("train", "--resume", run, "--env-steps", 2_600)
    assert result.code == 0, result.err
    count, more = adam_count(run)
    assert count == 7 + more
    assert more > updates

    shutil.rmtree(run / "checkpoints")
    result = cli("train", "--resume", run, "--env-steps", 3_000)
    assert result.code == 2
    assert "this run begins from" in result.err
    assert "is gone" in result.err


def test_a_run_that_ended_before_its_first_checkpoint_begins_there_again(ours, tmp_path, short):
    found, cfg = warm_start.saved_config(ours)
    cfg = importing.configuration.merge(cfg, {"env_steps": 1_200}, "test")
    run = runs.create(tmp_path / "run", cfg)
    warm_start.write(run, warm_start.WarmStart(found, 0))
    train(cfg, run, resume=True)
    count, updates = adam_count(run)
    assert count == 7 + updates


def test_prefill_given_by_the_user_acts_at_random(ours, cli, tmp_path, prefills):  # noqa: F811
    run = tmp_path / "run"
    options = ("--env-steps", 1_200, "--run-dir", run, "--learner.prefill", 50)
    assert cli("train", "--from-checkpoint", ours, *options).code == 0
    assert prefills == [50]


def test_a_checkpoint_of_another_shape_is_refused(ours, refused, tmp_path):  # noqa: F811
    run = tmp_path / "run"

    def refusal_of(*options: Any) -> str:
        sentence = refused("train", "--from-checkpoint", ours, "--run-dir", run, *options)
        assert not run.exists()
        return sentence

    assert "`method` cannot change" in refusal_of("--method", "osrp")
    assert "`size` cannot change" in refusal_of("--size", "nano")
    assert "`world_model.deter` cannot change" in refusal_of("--world-model.deter", 64)
    assert "`world_model.stoch` cannot change" in refusal_of("--world-model.stoch", 2)
    assert "`env.observation` cannot change" in refusal_of("--env.observation", "lidar")
    assert "model/encoder/vector" in refusal_of("--task", "SafetyPointGoal2-v0")
    assert "--resume" in refusal_of("--resume", run)
    assert "model/cost_head" in refusal_of("--safety.cost-model", "learned")
    assert "no run or checkpoint at" in refused("train", "--from-checkpoint", tmp_path / "absent")
    assert "no complete checkpoint" in refused("train", "--from-checkpoint", AUTHORS.parent)
