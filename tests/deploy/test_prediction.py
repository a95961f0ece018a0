"""Which parts of episodes are predicted, and what is compared."""

from __future__ import annotations

from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest

from common.types import ArraySpec, EnvSpec, UserError
from deploy import prediction, wiring
from deploy.eval_files import EvalFiles, checked_files
from learner.open_loop import Prediction


def episode(length: int, number: int = 0) -> dict[str, np.ndarray]:
    time = np.arange(length, dtype=np.float32)
    return {"reward": time + 1000 * number, "cost": time, "action": time[:, None], "vector": time[:, None]}


def test_windows_do_not_overlap_and_spread_over_the_episodes():
    windows = prediction.cut([episode(201), episode(120, 1)])
    assert windows.places == [(0, 0), (0, 50), (0, 101), (0, 151), (1, 0), (1, 70)]
    assert windows.batch["reward"].shape == (6, 50)
    assert [int(r) for r in windows.batch["reward"][:, 0]] == [0, 50, 101, 151, 1000, 1070]


def test_there_are_never_many_windows():
    assert len(prediction.cut([episode(1001)] * 5).places) == 20


def test_short_episodes_are_predicted_as_far_as_they_go():
    windows = prediction.cut([episode(7), episode(12, 1)])
    assert windows.places == [(1, 0)]
    assert windows.batch["vector"].shape == (1, 12, 1)
    with pytest.raises(UserError, match="no episode is longer than the 5 agent steps"):
        prediction.cut([episode(5)])


SPEC = EnvSpec("Tiny", {"vector": ArraySpec((5,))}, 1, 5, 100, {"hazards": (1, 5)})


@pytest.mark.parametrize(("kind", "scale"), [("learned", 1 / 5), ("tracked", 1), ("geometric", 1)])
def test_costs_are_compared_per_env_step(tiny_config, kind, scale):
    cfg = tiny_config(env={"action_repeat": 5}, safety={"cost_model": kind})
    vector = np.zeros((1, 8, 5), np.float32)
    vector[..., 1:] = 3.0, 4.0, 0.0, 1.0  # the second hazard is the nearest
    batch = {"reward": np.ones((1, 8)), "cost": np.full((1, 8), 5.0), "vector": vector}
    off: Any = vector + np.array([0.0, 9.0, 9.0, 0.3, 0.4], np.float32)
    ones: Any = np.ones((1, 8))
    sequences = prediction.compare(
        cfg, SPEC, prediction.Windows(batch, [(0, 30)]), Prediction(ones, ones, None, off, {}), [0]
    )
    np.testing.assert_allclose(sequences.signals["cost"].true, 1.0)
    np.testing.assert_allclose(sequences.signals["cost"].predicted, scale)
    np.testing.assert_allclose(sequences.hazards["decoded"], 0.5, rtol=1e-6)
    assert list(sequences.hazards) == ["decoded"]
    assert sequences.names == ["episode 1, agent step 30"]


def test_every_cost_model_says_what_it_means():
    assert set(wiring.COST_MEANINGS) == set(wiring.COST_MODELS)


def test_a_plot_stands_next_to_the_video(tmp_path):
    files = checked_files(None, tmp_path / "film.mp4", None)
    assert files.prediction_plot == tmp_path / "film.png"
    assert files.lines() == [
        f"prediction video: {tmp_path / 'film.mp4'}",
        f"prediction plot: {tmp_path / 'film.png'}",
    ]
    assert checked_files(None, None, tmp_path / "x.png").prediction_video is None
    (tmp_path / "film.png").mkdir()
    with pytest.raises(UserError, match=r"the plot .*film\.png cannot be written"):
        checked_files(None, tmp_path / "film.mp4", None)


def test_both_files_of_a_vision_checkpoint(tiny_config, tmp_path, monkeypatch):
    """With pictures that no camera took: this needs no OpenGL."""
    cfg = tiny_config(world_model={"cnn_depth": 2}, safety={"cost_model": "learned"})
    side = ArraySpec((16, 16, 3), "uint8")
    spec = EnvSpec("Tiny", {"image": side, "image2": side}, 2, 5, 100)
    monkeypatch.setattr(wiring, "cameras_of", lambda cfg: ("vision", "vision_back"))
    train = wiring.train_step(cfg, spec)
    params = train.acting(train.start())
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (9, 16, 16, 3), np.uint8) for name in spec.obs}
    recorded = {**images, "reward": np.zeros(9), "cost": np.zeros(9), "action": np.zeros((9, 2), np.float32)}
    files = EvalFiles(None, tmp_path / "film.mp4", tmp_path / "plot.png")
    prediction.check(cfg, spec, files)
    prediction.write(cfg, spec, params, [recorded] * 2, files)
    reader: Any = imageio.get_reader(tmp_path / "film.mp4")
    assert reader.count_frames() == 2 * 9
    reader.close()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
