import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import plots
from common.metrics import EPISODES, METRICS


def write_run(directory: Path, episodes: list[dict], rows: list[dict], config: str | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / EPISODES).write_text("".join(json.dumps(row) + "\n" for row in episodes))
    (directory / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (directory / "config.yaml").write_text(config)
    return directory


def episode(env_steps: int, return_: float, cost: float) -> dict:
    return {
        "env_steps": env_steps,
        "return": return_,
        "cost": cost,
        "length": 1000,
        "version": 1,
        "source": "a",
    }


def evaluation(env_steps: int, return_: float, cost: float) -> dict:
    scores = {"eval/return": return_, "eval/return_std": 1.0, "eval/cost": cost, "eval/cost_std": 2.0}
    return {"env_steps": env_steps, "wall_seconds": 1.0, **scores}


PID = "policy: actor\nsafety: {constraint: pid, cost_limit: 2.5}\n"


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, to be looked into."""
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, out: figures.append(figure) or save(figure, out))
    return figures


def legend(axis) -> set[str]:
    return {text.get_text() for text in axis.get_legend().get_texts()}


def line(axis, label: str):
    return next(line for line in axis.lines if line.get_label() == label)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_a_run_shows_training_evaluations_limit_and_untrained_policy(tmp_path, drawn):
    episodes = [episode(i * 1000, i, 50 - i) for i in range(30)]
    rows = [evaluation(0, -1.0, 48.0), {"env_steps": 500, "wall_seconds": 1.0, "loss/model": 3.0}]
    rows += [evaluation(20_000, 10.0, 20.0)]
    run = write_run(tmp_path / "run", episodes, rows, PID)
    assert png_size(plots.plot_run(run, tmp_path / "out" / "curve.png"))[0] > 800
    returns, costs = drawn[0].axes
    assert legend(returns) == {
        "training (mean of 20 episodes)",
        "evaluation (mean ± std)",
        "untrained policy (-1.0)",
    }
    assert "cost limit (2.5)" in legend(costs)
    assert "untrained policy (48.0)" in legend(costs)
    smooth = line(returns, "training (mean of 20 episodes)").get_ydata()
    assert smooth[0] == 0.0
    assert smooth[1] == pytest.approx(0.5)  # mean of 0, 1
    assert smooth[-1] == pytest.approx(np.mean(range(10, 30)))
    assert line(costs, "cost limit (2.5)").get_ydata()[0] == 2.5


def test_no_limit_and_no_reference_where_there_are_none(tmp_path, drawn):
    config = "policy: actor\nsafety: {constraint: augmented, cost_limit: 2.5}\n"
    run = write_run(tmp_path / "run", [], [evaluation(1000, 1.0, 2.0)], config)
    plots.plot_run(run, tmp_path / "curve.png")
    assert all(legend(axis) == {"evaluation (mean ± std)"} for axis in drawn[0].axes)


@pytest.mark.parametrize("content", [None, "", '{"env_steps": 10, "retu'])
def test_a_run_without_data_says_so(tmp_path, drawn, content):
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        (run / EPISODES).write_text(content)
    png_size(plots.plot_run(run, tmp_path / "one.png"))
    png_size(plots.plot_runs([run, run], tmp_path / "two.png", aggregate=True))
    for figure in drawn:
        for axis in figure.axes:
            assert [text.get_text() for text in axis.texts] == ["no episodes yet"]


def test_one_episode_and_null_values_are_drawn(tmp_path, drawn):
    rows = [{"env_steps": 5, "wall_seconds": 0.0, "eval/return": None, "eval/cost": 3.0}]
    run = write_run(tmp_path / "run", [episode(1000, 2.0, 3.0)], rows)
    plots.plot_run(run, tmp_path / "curve.png")
    returns, costs = drawn[0].axes
    assert "evaluation (mean ± std)" not in legend(returns)
    assert "evaluation (mean ± std)" in legend(costs)


def test_several_seeds_become_their_mean_and_range(tmp_path, drawn):
    runs = [
        write_run(
            tmp_path / f"seed{i}", [], [evaluation(0, i, 8.0), evaluation(1000 + 500 * i, 10 + i, 4.0)], PID
        )
        for i in range(3)
    ]
    plots.plot_runs(runs, tmp_path / "seeds.png", aggregate=True)
    returns, costs = drawn[0].axes
    mean = line(returns, "mean of 3 runs")
    assert mean.get_xdata()[[0, -1]].tolist() == [0.0, 1000.0]  # only what all runs reached
    # at env step 1000: 10, 1 + 10 * 2/3 and 2 + 10 / 2
    assert mean.get_ydata()[[0, -1]].tolist() == pytest.approx([1.0, (10 + (1 + 20 / 3) + 7) / 3])
    band = returns.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.0, 10.0))
    assert "cost limit (2.5)" in legend(costs)


def test_what_others_reached_is_drawn_beside_it(tmp_path, drawn):
    run = write_run(tmp_path / "run", [], [evaluation(0, 1.0, 8.0), evaluation(1000, 10.0, 4.0)], PID)
    plots.plot_runs([run], tmp_path / "x.png", references={"Other": (24.5, 1.5)})
    returns, costs = drawn[0].axes
    assert line(returns, "Other (24.5)").get_ydata()[0] == 24.5
    assert line(costs, "Other (1.5)").get_ydata()[0] == 1.5


def test_runs_are_grouped_by_label_and_fall_back_to_training_episodes(tmp_path, drawn):
    a, b = (
        write_run(tmp_path / name, [], [evaluation(0, v, v), evaluation(9, v, v)])
        for name, v in (("a", 1), ("b", 3))
    )
    c = write_run(tmp_path / "c", [episode(1, 5.0, 6.0)], [])
    plots.plot_runs([a, b, c], tmp_path / "x.png", labels=["safe", "safe", "fast"], aggregate=True)
    plots.plot_runs([a, b, c], tmp_path / "y.png")
    grouped, single = (figure.axes[0] for figure in drawn)
    assert legend(grouped) == {"safe", "fast"}
    assert line(grouped, "safe").get_ydata()[0] == 2.0
    assert line(grouped, "fast").get_ydata().tolist() == [5.0]
    assert legend(single) == {"a", "b", "c"}
    with pytest.raises(ValueError, match="2 labels for 3 runs"):
        plots.plot_runs([a, b, c], tmp_path / "z.png", labels=["safe", "fast"])


def test_importing_plots_is_light():
    code = "import sys, common.plots; print('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
