"""`safedreamer eval`: plays a checkpoint by the evaluation protocol."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from actors.evaluate import evaluate
from common import checkpoint
from common.config import Config
from common.metrics import summarize_episodes
from common.types import Params, UserError
from common.video import VideoWriter
from deploy import run_dir as runs
from deploy import wiring

_FPS = 100.0  # env steps per second of video time: about real time in navigation tasks


class Loaded(NamedTuple):
    """What a checkpoint holds for whoever acts."""

    cfg: Config
    params: Params
    meta: dict[str, Any]
    skipped: list[str]  # newer checkpoints of the run that are damaged


def load(path: Path) -> Loaded:
    """A run's newest intact checkpoint, or the one checkpoint that `path` is.

    Raises UserError when there is none, it is damaged, or does not fit its own configuration.
    """
    path = path.absolute()
    found = checkpoint.find_checkpoint(path)
    cfg = runs.config_of(found, checkpoint.read_meta(found))
    train = wiring.train_step(cfg, wiring.spec_of(cfg))
    like = jax.eval_shape(train.init, 0)
    restored = (
        checkpoint.restore(found, like) if found == path else checkpoint.restore_latest(found.parent, like)
    )
    assert restored is not None  # or there were none to find
    cfg = runs.config_of(found, restored.meta)
    return Loaded(cfg, train.acting(restored.tree), restored.meta, restored.skipped)


def check_fit(cfg: Config, task: str | None, observation: str | None) -> None:
    """Refuses a checkpoint of another task or observation than the user asks for."""
    if task is not None and task != cfg.task:
        raise UserError(f"this checkpoint was trained on {cfg.task}; it cannot be evaluated on {task}")
    if observation is not None and observation != cfg.env.observation:
        raise UserError(
            f"this checkpoint observes {cfg.env.observation}; it cannot be evaluated on {observation}"
        )


def run(
    cfg: Config, params: Params, *, episodes: int, seed: int, version: int, video: Path | None
) -> dict[str, float]:
    """Summary of `episodes` held-out episodes, see `common.metrics.summarize_episodes`."""
    with ExitStack() as stack:
        on_frame = None
        if video is not None:
            writer = stack.enter_context(VideoWriter(video, _FPS / cfg.env.action_repeat))
            on_frame = lambda frame, reward, cost: writer.add(frame, f"return {reward:.1f}   cost {cost:.0f}")  # noqa: E731
        spec = wiring.spec_of(cfg)
        env = wiring.evaluation_env(cfg, seed, episodes, render=video is not None)
        policy = wiring.policy(cfg, spec, explore=False)
        results = evaluate(env, policy, params, seed=seed, version=version, on_frame=on_frame)
        env.close()
    assert results is not None  # nothing stops it
    return summarize_episodes(results)
