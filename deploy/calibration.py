"""How right the world model is where safety is decided: logged with every evaluation (**ours**).

Parts of the evaluation's own episodes, which no training has seen, are predicted open loop: 5 agent steps
seen, 8 imagined under the true actions (`learner.open_loop`). A rate without anything to count is left out.

- `model/cost_calibration`: predicted cost / true cost, summed over all imagined steps; 1 is right, below 1
  unsafe.
- `model/cost_recall`: share of the truly costly imagined steps at which a cost of at least 0.5 was predicted.
- `model/cost_precision`: share of the steps with such a prediction that were truly costly.
- `model/openloop_error/N`: after N imagined steps, by how much (m) the nearest hazard is misplaced, where one
  is within 1 m. Without positions in the observation: the root mean square error of the decoded vector, else
  of the pictures (0 to 1); left out where the model decodes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from common.types import VECTOR, Batch, EnvSpec, Params
from learner.codec import image_keys
from learner.open_loop import Prediction

CONTEXT = 5  # agent steps seen
IMAGINED = 8
STEPS = (1, 2, 4, 8)
WINDOWS = 64
EPISODES = 5  # that are looked at; five with two cameras are some 100 MB at most
_NEAR = 1.0  # m
_COSTLY = 0.5  # per agent step, for costs that are counts or rates

Predict = Callable[[Params, Batch], Prediction]


def windows(episodes: Sequence[Batch]) -> Batch | None:
    """`WINDOWS` parts of episodes [N, T, ...], spread evenly; a few twice where there are not so many.

    Always as many, so that one program predicts them all. None when no episode is long enough.
    """
    length = CONTEXT + IMAGINED
    places = [
        (number, start)
        for number, episode in enumerate(episodes)
        for start in range(0, len(episode["reward"]) - length + 1, length)
    ]
    if not places:
        return None
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, WINDOWS).round().astype(int)]
    return {
        name: np.stack([episodes[number][name][start : start + length] for number, start in chosen])
        for name in episodes[0]
    }


def calibrate(
    predict: Predict, spec: EnvSpec, params: Params, episodes: Sequence[Batch], cost_unit: float | None
) -> dict[str, float]:
    """The table above for these parameters.

    Args:
        predict: `wiring.predictor` with a context of `CONTEXT` steps.
        cost_unit: see `wiring.cost_unit`.
    """
    batch = windows(episodes)
    if batch is None:
        return {}
    prediction = jax.device_get(predict(params, batch))
    imagined = slice(CONTEXT, None)
    found = {}
    if cost_unit is not None:
        predicted = np.asarray(prediction.cost)[:, imagined] * cost_unit
        found = _costs(predicted, batch["cost"][:, imagined])
    for steps, error in zip(STEPS, _errors(spec, batch, prediction), strict=True):
        if error is not None:
            found[f"model/openloop_error/{steps}"] = error
    return found


def _costs(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    warned, costly = predicted >= _COSTLY, true > 0
    found = {}
    if costly.any():
        found["model/cost_calibration"] = float(predicted.sum() / true.sum())
        found["model/cost_recall"] = float(warned[costly].mean())
    if warned.any():
        found["model/cost_precision"] = float(costly[warned].mean())
    return found


def _errors(spec: EnvSpec, batch: Batch, prediction: Prediction) -> list[float | None]:
    at = [CONTEXT + steps - 1 for steps in STEPS]
    if "hazards" in spec.slices:
        true = _pairs(spec, batch[VECTOR])
        tracked = prediction.hazards
        believed = _pairs(spec, np.asarray(prediction.vector)) if tracked is None else np.asarray(tracked)
        distance = np.linalg.norm(true, axis=-1)
        nearest = distance.argmin(-1)[..., None]
        off = np.take_along_axis(np.linalg.norm(believed - true, axis=-1), nearest, -1)[..., 0]
        near = distance.min(-1) < _NEAR
        return [float(off[near[:, t], t].mean()) if near[:, t].any() else None for t in at]
    if prediction.vector is None and not prediction.images:
        return [None] * len(STEPS)
    if prediction.vector is not None:
        error = np.square(np.asarray(prediction.vector) - batch[VECTOR]).mean((0, 2))
    else:
        keys = image_keys(spec)
        error = np.mean(
            [np.square(prediction.images[key] - batch[key] / 255.0).mean((0, 2, 3, 4)) for key in keys], 0
        )
    return [float(np.sqrt(error[t])) for t in at]


def _pairs(spec: EnvSpec, vector: np.ndarray) -> np.ndarray:
    start, stop = spec.slices["hazards"]
    return vector[..., start:stop].reshape(*vector.shape[:-1], -1, 2)
