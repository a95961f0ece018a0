"""Evaluation: whole episodes on fixed seeds. Never writes to replay, never moves the multiplier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np

from common.types import Batch, EpisodeResult, EvaluationEnv, Params, Policy, Step

_SEED_SPACE = 0x5AFE  # keeps evaluation layouts apart from training ones, whatever the seeds

# (image [h, w, 3], observation without an axis of environments, reward so far, cost so far)
Frame = Callable[[np.ndarray, dict[str, np.ndarray], float, float], None]
OnStep = Callable[[np.ndarray, Step], None]  # (the actions [k, A] that led to the step, the step)


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
    on_step: OnStep | None = None,
) -> list[EpisodeResult]:
    """Plays one episode in every environment of `env`, all of them at once.

    Args:
        act: `jax.jit(policy.act)`, where the caller evaluates often and keeps it.
        on_frame: gets a picture of the first environment after each of its agent steps.
        on_step: gets every step of all environments, see `Recorder`.

    Returns:
        The results in the order of the environments.
    """
    playing = play(
        env, policy, params, seed=seed, version=version, act=act, on_frame=on_frame, on_step=on_step
    )
    return next(results for results in playing if results is not None)


def play(
    env: EvaluationEnv,
    policy: Policy,
    params: Params,
    *,
    seed: int,
    version: int = 0,
    act: Callable | None = None,
    on_frame: Frame | None = None,
    on_step: OnStep | None = None,
) -> Iterator[list[EpisodeResult] | None]:
    """`evaluate`, one step at a time: None after each of them, the results after the last."""
    act = act or jax.jit(policy.act)
    params = jax.device_put(params)
    carry = policy.init(env.num_envs)
    key = jax.random.PRNGKey(seed)
    totals = np.zeros((3, env.num_envs))  # return, cost, env steps
    actions = np.zeros((env.num_envs, env.spec.action_size), np.float32)
    while True:
        step = env.step(actions)
        totals += (step.reward, step.cost, step.env_steps)
        if on_frame and (step.is_first[0] or step.env_steps[0]):
            obs = {name: x[0] for name, x in step.obs.items()}
            on_frame(env.render(0), obs, totals[0, 0], totals[1, 0])
        if on_step:
            on_step(actions, step)
        if env.finished.all():
            yield [
                EpisodeResult(float(r), float(c), int(n), version, f"eval/env{i}")
                for i, (r, c, n) in enumerate(totals.T)
            ]
            return
        yield None
        key, key_act = jax.random.split(key)
        carry, device_actions, _ = act(params, carry, step.obs, step.is_first, key_act)
        actions = np.asarray(device_actions)


class Recorder:
    """Keeps the whole episodes of the first environments: an `OnStep`."""

    def __init__(self, episodes: int):
        self._count = episodes
        self._steps: list[tuple[np.ndarray, Step]] = []

    def __call__(self, actions: np.ndarray, step: Step) -> None:
        kept = jax.tree.map(lambda x: x[: self._count].copy(), (actions, step))
        self._steps.append(kept)

    def episodes(self) -> list[Batch]:
        """One episode [T, ...] per environment: its observations, "reward", "cost" and "action".

        As in replay, `action[t]` was chosen at step t and led to t + 1; the last one is zero.
        """
        actions, steps = jax.tree.map(lambda *x: np.stack(x, 1), *self._steps)
        episodes = []
        for i in range(len(actions)):
            taken = steps.is_first[i] | (steps.env_steps[i] > 0)  # not while it waited for the others
            action = np.concatenate([actions[i][taken][1:], np.zeros_like(actions[i][:1])])
            signals = {"reward": steps.reward[i][taken], "cost": steps.cost[i][taken], "action": action}
            episodes.append({name: x[i][taken] for name, x in steps.obs.items()} | signals)
        return episodes


def random_policy(num_envs: int, action_size: int) -> Policy:
    """Uniform random actions: what a trained policy must beat, also in cost."""

    def act(params: Params, carry: tuple, obs: dict, is_first: np.ndarray, key: jax.Array) -> tuple:
        return carry, jax.random.uniform(key, (num_envs, action_size), minval=-1.0, maxval=1.0), {}

    return Policy(lambda count: (), act)
