"""What a trained world model predicts without looking, against what then happened: a video and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from common.config import Config
from common.pictures import prediction_frame
from common.prediction_plot import Sequences, Signal, plot_prediction
from common.types import VECTOR, Batch, EnvSpec, Params, UserError
from common.video import VideoWriter
from deploy import wiring
from deploy.eval_files import EvalFiles
from learner.codec import image_keys
from learner.open_loop import Prediction

EPISODES = 5  # that are recorded; five with two cameras are some 100 MB at most
_CONTEXT = 5  # agent steps that the model sees first
_IMAGINED = 45  # agent steps that it then predicts, fewer where episodes are shorter
_SEQUENCES = 20
_SHOWN = 5
_FPS = 10.0  # agent steps per second of video time


class Windows(NamedTuple):
    """Parts of episodes, all of one length."""

    batch: Batch  # [N, T, ...]
    places: list[tuple[int, int]]  # (episode, first agent step) of each, from 0


def check(cfg: Config, spec: EnvSpec, files: EvalFiles) -> None:
    """Raises UserError for a video of predictions by a model that sees nothing."""
    if files.prediction_video is not None and not image_keys(spec):
        raise UserError(
            f"this checkpoint observes {cfg.env.observation}, which has no pictures to predict; ask for the "
            f"curves: --prediction-plot {files.prediction_plot}"
        )


def write(cfg: Config, spec: EnvSpec, params: Params, episodes: Sequence[Batch], files: EvalFiles) -> None:
    """Predicts parts of recorded episodes and writes the files that were asked for."""
    windows = cut(episodes)
    predicted = jax.device_get(wiring.predict(cfg, spec, params, windows.batch, _CONTEXT))
    shown = [int(i) for i in np.unique(np.linspace(0, len(windows.places) - 1, _SHOWN).round())]
    if files.prediction_video is not None:
        with VideoWriter(files.prediction_video, _FPS) as video:
            for number, index in enumerate(shown, 1):
                _film(video, cfg, spec, windows, predicted, index, f"{number} of {len(shown)}")
    if files.prediction_plot is not None:
        plot_prediction(compare(cfg, spec, windows, predicted, shown), files.prediction_plot)


def cut(episodes: Sequence[Batch]) -> Windows:
    """Up to 20 windows that do not overlap, spread evenly over the episodes."""
    longest = max(len(episode["reward"]) for episode in episodes)
    length = min(_CONTEXT + _IMAGINED, longest)
    if length <= _CONTEXT:
        raise UserError(f"no episode is longer than the {_CONTEXT} agent steps that a prediction starts from")
    places = []
    for number, episode in enumerate(episodes):
        total = len(episode["reward"])
        starts = np.linspace(0, total - length, total // length).round()
        places += [(number, int(start)) for start in starts]
    chosen = np.unique(np.linspace(0, len(places) - 1, _SEQUENCES).round())
    places = [places[int(i)] for i in chosen]
    batch = {
        name: np.stack([episodes[number][name][start : start + length] for number, start in places])
        for name in episodes[0]
    }
    return Windows(batch, places)


def compare(
    cfg: Config, spec: EnvSpec, windows: Windows, predicted: Prediction, shown: Sequence[int]
) -> Sequences:
    """Everything the plot shows."""
    repeat, meaning = cfg.env.action_repeat, wiring.COST_MEANINGS[cfg.safety.cost_model]
    cost = np.asarray(predicted.cost) / (repeat if meaning.per_agent_step else 1)
    return Sequences(
        title=f"open-loop prediction: {cfg.method} on {cfg.task}, {cfg.env.observation}",
        context=_CONTEXT,
        step_unit=f"agent steps ({repeat} env steps each)",
        names=[f"episode {number + 1}, agent step {start}" for number, start in windows.places],
        shown=shown,
        horizon=cfg.planner.horizon if cfg.policy == "planner" else cfg.behavior.horizon,
        signals={
            "reward": Signal("per agent step", windows.batch["reward"], np.asarray(predicted.reward)),
            "cost": Signal("per env step", windows.batch["cost"] / repeat, cost, meaning.source),
        },
        hazards=_hazard_errors(spec, windows.batch, predicted),
        hazard_radius=cfg.safety.hazard_radius,
    )


def _hazard_errors(spec: EnvSpec, batch: Batch, predicted: Prediction) -> dict[str, np.ndarray]:
    """By how much (m) the hazard that truly is the nearest was misplaced [N, T], per source."""
    if "hazards" not in spec.slices:
        return {}

    def pairs(vector: np.ndarray) -> np.ndarray:
        start, stop = spec.slices["hazards"]
        return vector[..., start:stop].reshape(*vector.shape[:-1], -1, 2)

    true = pairs(batch[VECTOR])
    decoded = None if predicted.vector is None else pairs(np.asarray(predicted.vector))
    sources = {"tracked": predicted.hazards, "decoded": decoded}
    nearest = np.linalg.norm(true, axis=-1).argmin(-1)[..., None]
    return {
        name: np.take_along_axis(np.linalg.norm(hazards - true, axis=-1), nearest, -1)[..., 0]
        for name, hazards in sources.items()
        if hazards is not None
    }


def _film(
    video: VideoWriter,
    cfg: Config,
    spec: EnvSpec,
    windows: Windows,
    predicted: Prediction,
    index: int,
    number: str,
) -> None:
    """One sequence, a frame per agent step."""
    cameras = dict(zip(image_keys(spec), wiring.cameras_of(cfg), strict=True))
    images = {key: _pixels(np.asarray(predicted.images[key][index])) for key in cameras}
    length = len(windows.batch["reward"][index])
    episode, start = windows.places[index]
    for step in range(length):
        pairs = {name: (windows.batch[key][index, step], images[key][step]) for key, name in cameras.items()}
        how = f"imagined {step - _CONTEXT + 1} of {length - _CONTEXT}" if step >= _CONTEXT else "filtered"
        place = f"sequence {number}, episode {episode + 1}, agent step {start + step}"
        video.add(prediction_frame(pairs, step, _CONTEXT, length), f"{place}: {how}")


def _pixels(image: np.ndarray) -> np.ndarray:
    """Values around 0 to 1 as uint8."""
    return (np.clip(image, 0.0, 1.0) * 255).round().astype(np.uint8)
