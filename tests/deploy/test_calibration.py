"""How right a world model is, by hand; and in the metrics of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.types import ArraySpec, EnvSpec
from deploy.calibration import CONTEXT, IMAGINED, STEPS, WINDOWS, calibrate, windows
from learner.open_loop import Prediction

T = CONTEXT + IMAGINED
SPEC = EnvSpec("Tiny", {"vector": ArraySpec((5,))}, 1, 5, 100, {"hazards": (1, 5)})
PLAIN = EnvSpec("Plain", {"vector": ArraySpec((5,))}, 1, 5, 100)
SEEING = EnvSpec("Seeing", {"image": ArraySpec((4, 4, 3), "uint8")}, 1, 5, 100)


def episode(length: int, number: int = 0) -> dict[str, np.ndarray]:
    vector = np.zeros((length, 5), np.float32)
    vector[:, 1:] = 3.0, 4.0, 0.0, 0.5  # the second hazard is the nearest, half a metre ahead
    time = np.arange(length, dtype=np.float32)
    image = np.full((length, 4, 4, 3), 51, np.uint8)
    zeros = np.zeros(length, np.float32)
    return {"reward": time + 1000 * number, "cost": zeros, "vector": vector, "image": image}


def predicting(**changes: Any) -> Any:
    def predict(params: Any, batch: Any) -> Prediction:
        given = {"cost": np.zeros((WINDOWS, T)), "hazards": None, "vector": batch["vector"], "images": {}}
        return Prediction(reward=np.zeros((WINDOWS, T)), **(given | changes))  # pyright: ignore

    return predict


def test_windows_are_as_many_however_short_the_episodes_are():
    batch = windows([episode(40), episode(T, 1), episode(5, 2)])
    assert batch is not None
    assert batch["reward"].shape == (WINDOWS, T)
    assert sorted(set(batch["reward"][:, 0].tolist())) == [0, 13, 26, 1000]
    many = windows([episode(1001, n) for n in range(5)])
    assert many is not None
    assert len(set(many["reward"][:, 0].tolist())) == WINDOWS
    assert windows([episode(T - 1)]) is None
    assert calibrate(predicting(), SPEC, None, [episode(T - 1)], 1.0) == {}


def test_costs_by_hand():
    record = episode(T)
    record["cost"][CONTEXT : CONTEXT + 4] = 5.0  # four costly agent steps of eight imagined ones
    record["cost"][0] = 5.0  # seen, not imagined
    cost = np.zeros((WINDOWS, T))
    cost[:, CONTEXT + 3 : CONTEXT + 5] = 1.0  # one of them predicted, one that is none
    cost[:, 1] = 1.0
    found = calibrate(predicting(cost=cost), SPEC, None, [record], cost_unit=5.0)
    assert found["model/cost_calibration"] == pytest.approx(2 * 5 / 20)
    assert found["model/cost_recall"] == 0.25
    assert found["model/cost_precision"] == 0.5
    free = calibrate(predicting(), SPEC, None, [episode(T)], cost_unit=5.0)
    assert not any("cost" in name for name in free)  # nothing to count
    assert not any("cost" in name for name in calibrate(predicting(cost=cost), SPEC, None, [record], None))


def test_the_nearest_hazard_counts_where_it_is_near():
    hazards = np.zeros((WINDOWS, T, 2, 2))
    hazards[:] = [[9.0, 9.0], [0.0, 0.5]]  # the far one may be anywhere
    hazards[:, :, 1, 0] = np.arange(T) - (CONTEXT - 1)  # a metre more per imagined step
    found = calibrate(predicting(hazards=hazards), SPEC, None, [episode(T)], 1.0)
    assert {n: found[f"model/openloop_error/{n}"] for n in STEPS} == {1: 1, 2: 2, 4: 4, 8: 8}
    decoded = np.zeros((WINDOWS, T, 5), np.float32)
    decoded[..., 1:] = 3.0, 4.0, 0.3, 0.1
    found = calibrate(predicting(vector=decoded), SPEC, None, [episode(T)], 1.0)
    assert found["model/openloop_error/8"] == pytest.approx(0.5)
    far = episode(T)
    far["vector"][:, 3:] = 3.0, 3.0
    assert calibrate(predicting(hazards=hazards), SPEC, None, [far], 1.0) == {}


def test_without_positions_the_decoded_observation_counts():
    vector = episode(T)["vector"] + np.array([0.0, 0.0, 0.0, 0.0, 1.0], np.float32)
    found = calibrate(predicting(vector=vector[None]), PLAIN, None, [episode(T)], 1.0)
    assert found["model/openloop_error/4"] == pytest.approx(np.sqrt(1 / 5))
    image = {"image": np.full((WINDOWS, T, 4, 4, 3), 0.3)}
    found = calibrate(predicting(vector=None, images=image), SEEING, None, [episode(T)], 1.0)
    assert found["model/openloop_error/1"] == pytest.approx(0.1)
