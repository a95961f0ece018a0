"""Imagination, returns, actor, critics and their losses from the recorded posterior."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learner.actor_critic import critic_loss, evaluate, imagine
from learner.cost_model import State
from learner.lagrange import augmented_penalty
from learner.returns import Moments
from learner.rssm import Latent
from learner.train_step import TrainState
from learner.world_model import WorldModel
from tests.parity.recorded import BINS, System, assert_close, latents, pin, sines

KEY = jax.random.PRNGKey(0)


def compute(system: System) -> dict[str, Any]:
    """Everything that is compared, by its recorded name; compiled once per method."""
    cfg, train, recorded = system.cfg.behavior, system.train, system.recorded

    def quantities(state: TrainState, start: Latent, is_terminal: jax.Array) -> dict[str, Any]:
        model, begin, cont = state.model, State(start, None), 1.0 - is_terminal
        assert isinstance(model, WorldModel)
        imagined = imagine(model, state.actor, begin, cfg.horizon, KEY)
        critics = (state.critic, state.cost_critic)
        outcome = evaluate(imagined, cont, model, *critics, train.cost_model, cfg)
        later = imagined.states.latent
        policy, acting = state.actor(start.feat), state.actor(later.feat)
        reward, feat = outcome.reward, outcome.feat
        out = {
            "actor/mean": policy.mean,
            "actor/std": policy.std,
            "actor/entropy": policy.entropy(),
            "traj/deter": later.deter,
            "traj/stoch": later.stoch,
            "traj/action": acting.sample_with(sines(cont.shape[0], 2)),
            "traj/cont": jnp.concatenate([cont[None], model.cont(later).mode[1:]]),
            "traj/weight": outcome.weight,
            "score/reward": model.reward(later).mean[1:],
            "score/ret": reward.return_,
            "score/base": reward.value[:-1],
            "critic_loss": critic_loss(state.critic, feat[:-1], reward.return_, outcome.weight),
            "critic_slow_mean": state.critic.slow_value(feat).mean,
            "actor_loss": train._actor_loss(state.actor, model, state, begin, cont, KEY)[0],
        }
        if outcome.cost is not None and state.cost_critic is not None:
            return_ = outcome.cost.return_
            loss = critic_loss(state.cost_critic, feat[:-1], return_, outcome.weight)
            out |= {
                "score/cost": train.cost_model(model, imagined.states)[1:],
                "score/cost_ret": return_,
                "score/cost_base": outcome.cost.value[:-1],
                "cost_critic_loss": loss,
            }
        return out

    start = latents(recorded, "post/deter", "post/stoch")
    start = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), start)
    is_terminal = recorded["data/is_terminal"].reshape(-1).astype(np.float32)
    return jax.device_get(pin(quantities)(system.state, start, is_terminal))


@pytest.fixture(scope="module")
def results(vector: System, pid: System, augmented: System) -> dict[str, tuple[System, dict[str, Any]]]:
    systems = {"osrp_vector": vector, "osrp_lag": pid, "bsrp_lag": augmented}
    return {method: (system, compute(system)) for method, system in systems.items()}


@pytest.fixture(params=["osrp_vector", "osrp_lag", "bsrp_lag"])
def case(request: pytest.FixtureRequest, results: dict) -> tuple[System, dict[str, Any]]:
    return results[request.param]


@pytest.fixture(params=["osrp_lag", "bsrp_lag"])
def costly(request: pytest.FixtureRequest, results: dict) -> tuple[System, dict[str, Any]]:
    return results[request.param]


def compare(case: tuple[System, dict[str, Any]], *names: str, terms: float = 0.0) -> None:
    system, ours = case
    for name in names:
        assert_close(ours[name], system.recorded[name], terms=terms, name=name)


def test_actor_distribution(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "actor/mean", "actor/std", "actor/entropy")


def test_imagined_trajectory(case: tuple[System, dict[str, Any]]) -> None:
    system, ours = case
    # Both sides add a last action, which no state follows: theirs is the actor's as well.
    compare(case, "traj/deter", "traj/stoch", "traj/action", "traj/cont")
    assert (ours["traj/cont"][0] == 0).any()  # a terminal start
    # The weight of the last state is never used; ours leaves it out.
    assert_close(ours["traj/weight"], system.recorded["traj/weight"][:-1])


def test_lambda_return_of_the_reward(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "score/reward", "score/ret", "score/base", terms=BINS)


def test_lambda_return_of_the_cost(costly: tuple[System, dict[str, Any]]) -> None:
    compare(costly, "score/cost", "score/cost_ret", "score/cost_base", terms=BINS)


def test_critic_loss(case: tuple[System, dict[str, Any]]) -> None:
    compare(case, "critic_slow_mean", terms=BINS)
    compare(case, "critic_loss")


def test_cost_critic_loss(costly: tuple[System, dict[str, Any]]) -> None:
    compare(costly, "cost_critic_loss")


def test_actor_loss(case: tuple[System, dict[str, Any]]) -> None:
    """Advantages of two-hot means: their terms are of order one, their mean is a few hundredths."""
    compare(case, "actor_loss", terms=BINS)


def test_actor_loss_holds_the_augmented_lagrangian(results: dict) -> None:
    (_, unconstrained), (system, constrained) = results["osrp_lag"], results["bsrp_lag"]
    state = system.state.multiplier
    violation = (constrained["score/cost_ret"].sum(0) - system.cfg.safety.cost_limit).mean()
    penalty = augmented_penalty(state, violation)
    assert abs(penalty) > 0.1
    # Reward critics and actors of both recordings are equal, only the penalty sets the losses apart.
    assert_close(constrained["actor_loss"] - unconstrained["actor_loss"], penalty)


def test_return_percentiles(vector: System) -> None:
    moments, rows = Moments.init(), vector.recorded["moments/out"]
    for returns, (offset, scale, low, high) in zip(vector.recorded["moments/inputs"], rows, strict=True):
        moments = moments.update(jnp.asarray(returns), vector.cfg.behavior.moments_decay)
        assert offset == low
        assert_close([moments.low, moments.high, moments.scale], [low, high, scale])
