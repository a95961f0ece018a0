from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.prediction_plot import Sequences, Signal, plot_prediction


def sequences(count: int, length: int, context: int, **more: Any) -> Sequences:
    rng = np.random.default_rng(0)
    signals = {
        name: Signal(f"per {name}", rng.normal(size=(count, length)), rng.normal(size=(count, length)))
        for name in ("reward", "cost")
    }
    return Sequences(
        "title",
        context,
        "agent steps",
        ["x"] * count,
        range(min(3, count)),
        horizon=4,
        signals=signals,
        **more,
    )


def test_imagined_steps_are_counted_from_the_last_filtered_one():
    np.testing.assert_array_equal(sequences(1, 5, 3).steps, [-2, -1, 0, 1, 2])


@pytest.mark.parametrize(("count", "length", "context"), [(6, 12, 5), (1, 6, 5), (2, 9, 1)])
@pytest.mark.parametrize("hazards", [False, True])
def test_the_plot_is_written(tmp_path: Path, count: int, length: int, context: int, hazards: bool):
    more: dict[str, Any] = {}
    if hazards:
        more = {"hazards": {"tracked": np.ones((count, length))}, "hazard_radius": 0.25}
    path = plot_prediction(sequences(count, length, context, **more), tmp_path / "plot.png")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] >= 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    predicted = (pixels == (0xD5, 0x5E, 0x00)).all(-1)
    for part in np.array_split(predicted, 3):  # reward, cost, errors
        assert part.any()
