"""`safedreamer eval`: plays a checkpoint by the evaluation protocol."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from actors.evaluate import Frame, Recorder, evaluate, random_policy
from common import checkpoint
from common.config import Config
from common.metrics import summarize_episodes
from common.pictures import episode_frame
from common.types import EnvSpec, Params, UserError
from common.video import VideoWriter
from deploy import calibration, prediction, wiring
from deploy import run_dir as runs
from deploy.eval_files import EvalFiles
from learner.codec import image_keys

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
    cfg: Config,
    params: Params,
    *,
    episodes: int,
    seed: int,
    version: int,
    files: EvalFiles,
    random: bool = False,
) -> dict[str, float]:
    """Summary of `episodes` held-out episodes, see `common.metrics` and `deploy.calibration`.

    With `random`, uniform random actions are played instead of the configured policy.

    Raises UserError for files that this observation or machine does not allow, before anything is played.
    """
    spec = wiring.spec_of(cfg)
    prediction.check(cfg, spec, files)
    with ExitStack() as stack:
        on_frame = None
        if files.video is not None:
            on_frame = _filmed(
                cfg, spec, stack.enter_context(VideoWriter(files.video, _FPS / cfg.env.action_repeat))
            )
        recorder = Recorder(prediction.EPISODES)
        env = wiring.evaluation_env(cfg, seed, episodes, render=files.video is not None)
        chosen = (
            random_policy(episodes, spec.action_size) if random else wiring.policy(cfg, spec, explore=False)
        )
        results = evaluate(
            env, chosen, params, seed=seed, version=version, on_frame=on_frame, on_step=recorder
        )
        env.close()
    episodes_seen = recorder.episodes()
    if files.prediction_plot is not None:
        prediction.write(cfg, spec, params, episodes_seen, files)
    predict = wiring.predictor(cfg, spec, calibration.CONTEXT)
    model = calibration.calibrate(
        predict, spec, jax.tree.leaves(params), episodes_seen, wiring.cost_unit(cfg)
    )
    return summarize_episodes(results) | model


def _filmed(cfg: Config, spec: EnvSpec, video: VideoWriter) -> Frame:
    """Writes each frame with the agent's cameras beside it, and reward and cost so far above it."""
    cameras = dict(zip(image_keys(spec), wiring.cameras_of(cfg), strict=True))

    def on_frame(outside: np.ndarray, obs: dict[str, np.ndarray], reward: float, cost: float) -> None:
        views = {name: obs[key] for key, name in cameras.items()}
        video.add(episode_frame(outside, views), f"return {reward:.1f}   cost {cost:.0f}")

    return on_frame
