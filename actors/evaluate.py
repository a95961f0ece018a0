"""Evaluation: whole episodes on fixed seeds. Never writes to replay, never moves the multiplier."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from common.types import EpisodeResult, EvaluationEnv, Params, Policy

_SEED_SPACE = 0x5AFE  # keeps evaluation layouts apart from training ones, whatever the seeds

Frame = Callable[[np.ndarray, float, float], None]  # (image [h, w, 3], reward so far, cost so far)


def evaluation_seeds(seed: int, episodes: int) -> list[int]:
    """Reset seeds of the evaluation episodes; episode i is the same whatever their number."""
    children = np.random.SeedSequence([_SEED_SPACE, seed]).spawn(episodes)
    return [int(child.generate_state(1)[0]) for child in children]


def evaluate(
    env: EvaluationEnv,
    policy: Policy,
    params: Params,
    *,
    seed: int,
    version: int = 0,
    act: Callable | None = None,
    on_frame: Frame | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[EpisodeResult] | None:
    """Plays one episode in every environment of `env`, all of them at once.

    Args:
        act: `jax.jit(policy.act)`, where the caller evaluates often and keeps it.
        on_frame: gets a picture of the first environment after each of its agent steps.

    Returns:
        The results in the order of the environments, or None if `should_stop` said so before the end.
    """
    act = act or jax.jit(policy.act)
    params = jax.device_put(params)
    carry = policy.init(env.num_envs)
    key = jax.random.PRNGKey(seed)
    totals = np.zeros((3, env.num_envs))  # return, cost, env steps
    actions = np.zeros((env.num_envs, env.spec.action_size), np.float32)
    while not should_stop():
        step = env.step(actions)
        totals += (step.reward, step.cost, step.env_steps)
        if on_frame and (step.is_first[0] or step.env_steps[0]):
            on_frame(env.render(0), totals[0, 0], totals[1, 0])
        if env.finished.all():
            return [
                EpisodeResult(float(r), float(c), int(n), version, f"eval/env{i}")
                for i, (r, c, n) in enumerate(totals.T)
            ]
        key, key_act = jax.random.split(key)
        carry, device_actions, _ = act(params, carry, step.obs, step.is_first, key_act)
        actions = np.asarray(device_actions)
    return None


def untrained_actions(num_envs: int, action_size: int) -> Policy:
    """The policy that knows nothing: uniform random actions. Its cost is what training must undercut."""

    def act(params: Params, carry: tuple, obs: dict, is_first: np.ndarray, key: jax.Array) -> tuple:
        return carry, jax.random.uniform(key, (num_envs, action_size), minval=-1.0, maxval=1.0), {}

    return Policy(lambda count: (), act)
