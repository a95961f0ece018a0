"""Published variables find their place, or are refused by name; ours start as theirs do."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

from common.types import UserError
from learner.reference_variables import AdamMoments, assign, rows
from learner.train_step import TrainState
from tests.parity.recorded import System

Variables = dict[str, np.ndarray]

GRU = "agent/wm/rssm/gru/kernel"
CRITIC = "agent/task_behavior/critic"


def leaves_of(tree: TrainState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def moments(system: System) -> dict[str, AdamMoments]:
    """Optimiser states as a checkpoint holds them, with the variables themselves as first moments."""
    variables = system.group("var")
    trained = {
        "agent/wm/model_opt": "agent/wm/",
        f"{CRITIC}/critic_opt": f"{CRITIC}/net/",
        "agent/task_behavior/ac/actor_opt": "agent/task_behavior/ac/actor/",
    }
    return {
        f"{name}/state": AdamMoments(
            7,
            {key: x for key, x in variables.items() if key.startswith(scope) and x.dtype == np.float32},
            {key: 2 * x for key, x in variables.items() if key.startswith(scope) and x.dtype == np.float32},
        )
        for name, scope in trained.items()
    }


@pytest.mark.parametrize("name", ["vector", "pid", "augmented"])
def test_every_parameter_is_in_the_table(name: str, request: pytest.FixtureRequest) -> None:
    state = request.getfixturevalue(name).state
    paths = [row.path for row in rows(state)]
    assert len(paths) == len(set(paths))
    modules = (".model.", ".actor.", ".critic.", ".cost_critic.", ".moments.")
    assert {path for path in leaves_of(state) if path.startswith(modules)} <= set(paths)


def test_templates_are_filled(augmented: System) -> None:
    """What a checkpoint does not hold stays as it was."""
    template = jax.eval_shape(lambda: augmented.train.init(0))
    filled = leaves_of(assign(augmented.group("var"), template))
    left = {path for path, leaf in filled.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
    optimizers = {path for path in filled if "_opt[" in path}
    assert left == optimizers | {".key", ".bad_in_row"}
    assert float(filled[".multiplier.multiplier"]) == 0.5
    assert float(filled[".multiplier.penalty"]) == pytest.approx(0.05)
    assert float(filled[".cost_moments.low"]) == pytest.approx(-0.3)
    assert int(filled[".updates"]) == 3


def test_optimiser_states(vector: System) -> None:
    """Their flat vectors are in the order of our leaves."""
    state = assign(vector.group("var"), vector.state, moments(vector))
    pairs = (
        (state.model, state.model_opt),
        (state.actor, state.actor_opt),
        (state.critic.fast, state.critic_opt),
    )
    for module, opt_state in pairs:
        adam = opt_state[1][0]
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(module)])
        assert int(adam.count) == 7
        np.testing.assert_array_equal(adam.mu, flat)
        np.testing.assert_array_equal(adam.nu, 2 * flat)


def test_loss_scaling_of_half_precision_is_ignored(vector: System) -> None:
    scaling = {
        "agent/wm/model_opt/grad_scale/value": np.float32(1e4),
        "agent/wm/model_opt/good_steps/value": np.int32(3),
    }
    assign(vector.group("var") | scaling, vector.state)


def replaced(name: str, value: object) -> Callable[[Variables], Variables]:
    return lambda variables: variables | {name: value}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: {name: x for name, x in v.items() if name != GRU}, f"missing: {GRU}"),
        (
            lambda v: {name: x for name, x in v.items() if not name.endswith("critic/updates/value")},
            f"missing: {CRITIC}/updates/value",
        ),
        (
            replaced("agent/wm/cost/h0/kernel", np.zeros(3)),
            "no place in this method: agent/wm/cost/h0/kernel",
        ),
        (replaced(GRU, np.zeros((48, 95), np.float32)), rf"do not fit: {GRU} \(shape \(48, 95\), for"),
        (replaced(GRU, np.zeros(4, np.float32)), rf"do not fit: {GRU} \(shape"),
        (replaced(GRU, np.full((48, 96), np.nan, np.float32)), rf"{GRU} \(not finite"),
        (replaced(GRU, np.zeros((48, 96), int)), rf"{GRU} \(not an array of floating"),
        (replaced(GRU, "gru"), rf"{GRU} \(not an array of floating"),
        (replaced(f"{CRITIC}/updates/value", np.zeros(2)), r"updates/value \(not a single number"),
        (replaced(f"{CRITIC}/updates/value", "three"), r"updates/value \(not a single number"),
    ],
)
def test_variables_that_do_not_fit_are_named(
    vector: System, change: Callable[[Variables], Variables], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        assign(change(vector.group("var")), vector.state)


def test_a_long_list_of_problems_is_cut(vector: System) -> None:
    with pytest.raises(UserError, match=r"missing: .* and \d+ more$"):
        assign({}, vector.state)


def test_optimiser_states_that_do_not_fit_are_named(vector: System) -> None:
    states = moments(vector)
    with pytest.raises(UserError, match=r"missing: .*, agent/wm/model_opt/state$"):
        assign(vector.group("var"), vector.state, {})
    broken = states["agent/wm/model_opt/state"]._replace(nu={})
    with pytest.raises(UserError, match="missing: agent/wm/cont/"):
        assign(vector.group("var"), vector.state, states | {"agent/wm/model_opt/state": broken})


# --- initial variables --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def initial(augmented: System) -> dict[str, np.ndarray]:
    """A fresh state's variables, by their published names."""
    state = leaves_of(jax.device_get(augmented.train.start()))
    variables: dict[str, list[np.ndarray]] = {}
    for row in rows(augmented.state):
        variables.setdefault(row.name, []).append(np.asarray(state[row.path]))
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in variables.items()}


def test_initial_variables_are_drawn_alike(augmented: System, initial: dict) -> None:
    """Hidden kernels truncated normal, output kernels uniform, some zero, norms 1 and 0, others as given.

    The largest of some hundred numbers in units of their standard deviation tells the distributions apart:
    1.73 for a uniform, 2.27 for a normal that is cut at two (of its untruncated) standard deviations.
    """
    ours, told_apart = initial, set()
    for name, (mean, std, low, high) in augmented.group("init").items():
        if name not in ours:
            continue
        x = ours[name].astype(np.float64)
        if std == 0:
            np.testing.assert_allclose(x, mean, rtol=1e-6, err_msg=name)
            continue
        assert name.endswith("kernel")
        spread = 4 / np.sqrt(2 * x.size)  # four standard errors of a standard deviation
        assert x.std() == pytest.approx(std, rel=spread), name
        assert abs(x.mean() - mean) < 6 * std / np.sqrt(x.size), name
        if x.size >= 256:
            uniform = max(-low, high) / std < 2
            assert (np.abs(x).max() / x.std() < 2) == uniform, name
            told_apart.add(uniform)
    assert told_apart == {True, False}


def test_zero_kernels(augmented: System, initial: dict) -> None:
    zero = {name for name, x in initial.items() if name.endswith("kernel") and not np.any(x)}
    recorded = augmented.group("init")
    assert zero == {name for name, (_, std, *_) in recorded.items() if name.endswith("kernel") and std == 0}
    assert "agent/wm/rew/dist_out/out/kernel" in zero
    assert f"{CRITIC}/net/dist_out/out/kernel" in zero
    assert "agent/wm/cost/dist_out/out/kernel" not in zero
