import io
import logging
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from common import terminal
from common.status import StatusView, sparkline, status_line
from common.terminal import Evaluation, RunResult, Status, TerminalView, eval_table, print_result
from common.types import EpisodeResult

SUMMARY = {
    "eval/return": 19.25,
    "eval/return_std": 2.0,
    "eval/cost": 12.5,
    "eval/cost_std": 4.0,
    "eval/cost_rate": 0.0125,
    "eval/length": 1000.0,
    "eval/episodes": 10.0,
}


def fresh() -> Status:
    return Status("bsrp_pid", "SafetyPointGoal1-v0", "nano", 4, Path("runs/one"), env_steps_total=400_000)


def busy() -> Status:
    s = fresh()
    s.phase, s.env_steps, s.env_steps_per_second = "training", 100_000, 1500.0
    s.updates, s.updates_per_second, s.train_ratio, s.train_ratio_target = 2331, 12.1, 511.3, 512.0
    s.actors_waiting, s.learner_waiting, s.version, s.staleness, s.multiplier = 0.12, 0.03, 233, 1.2, 0.01234
    for i in range(40):
        s.episodes.append(EpisodeResult(float(i), 100.0 - i, 1000, i, "actor0/env0"))
    for i in range(6):
        s.evaluations.append(Evaluation(i * 20_000, i * 3.0, 2.5, 60.0 - i, 12.0))
    s.warnings.append("actor 1 died and was restarted")
    return s


def rendered(status: Status, width: int, height: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
    console.print(StatusView(status))
    return out.getvalue().splitlines()


def test_the_view_says_how_far_how_good_and_how_safe():
    text = "\n".join(rendered(busy(), 100, 40))
    for expected in (
        "bsrp_pid · SafetyPointGoal1-v0 · nano · seed 4",
        "runs/one",
        "100,000 / 400,000 env steps",
        "1,500 env steps/s, 12.1 updates/s",
        "0:03:20 left",  # 300,000 at 1500/s
        "2,331",
        "511.3 of 512",
        "waiting for the learner 12 %",
        "waiting for the actors 3 %",
        "version 233, actors 1.2 behind",
        "0.01234",
        "last 20 episodes",
        "29.50",  # mean of returns 20..39
        "70.50",  # mean of costs 80..61
        "0.0705",  # per env step
        "15.00 ± 2.50",
        "55.00 ± 12.00",
        "! actor 1 died and was restarted",
    ):
        assert expected in text


@pytest.mark.parametrize("status", [fresh(), busy()])
@pytest.mark.parametrize(("width", "height"), [(60, 40), (60, 12), (40, 8), (80, 24), (200, 60), (24, 5)])
def test_the_view_stays_within_the_terminal(status, width, height):
    lines = rendered(status, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) < height  # the cursor's line is below it


def test_a_short_terminal_keeps_what_matters_most():
    text = "\n".join(rendered(busy(), 60, 12))
    assert "100,000 / 400,000 env steps" in text
    assert "29.50" in text
    assert "evaluation" not in text


def test_who_is_down_and_for_how_long_is_shown_everywhere():
    status = busy()
    status.down = {"actor 1": 3.2, "replay": 12.0}
    expected = "down: actor 1 for 3 s, replay for 12 s"
    assert expected in "\n".join(rendered(status, 60, 14))
    assert expected in status_line(status)
    assert "down" not in status_line(busy())


def test_an_unknown_value_is_not_shown():
    text = "\n".join(rendered(fresh(), 100, 40))
    assert not re.search(r"multiplier|waiting|version|None|\bnan\b", text)
    assert "no episode has ended yet" in text


def test_sparkline_by_hand():
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([0.0, 0.0, 1.0, 1.0], width=2) == "▁█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([float("nan"), 1.0]) == "▁"
    assert sparkline([]) == ""


def test_an_eta_beyond_reason_is_left_out():
    status = busy()
    status.env_steps_per_second = 1e-12
    assert "left" not in "\n".join(rendered(status, 100, 40))


def test_status_line_is_one_line():
    line = status_line(busy())
    assert "\n" not in line
    for part in (
        "training: 100,000/400,000 env steps (25 %)",
        "train ratio 511.3 of 512",
        "return 29.5, cost 70.5",
        "multiplier 0.0123",
        "evaluation at 100,000: return 15.0, cost 55.0",
    ):
        assert part in line
    assert "return" not in status_line(fresh())


def screen(output: str) -> list[str]:
    """What a terminal shows after `output`: line feeds, cursor up, erase line; colours are ignored."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[a-zA-Z]|\n|\r|[^\x1b\n\r]+", output):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b") and part[-1] == "A":
            row = max(0, row - int(part[2:-1] or 1))
        elif part.startswith("\x1b") and part[-1] == "K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


@pytest.fixture
def root_handlers():
    """The root logger as an application has it: one handler that writes to the terminal."""
    root = logging.getLogger()
    saved, level = root.handlers[:], root.level
    own = logging.StreamHandler(sys.stderr)
    root.handlers[:] = [own]
    root.setLevel(logging.INFO)
    yield [own]
    root.handlers[:] = saved
    root.setLevel(level)


def test_log_lines_and_prints_do_not_destroy_the_live_view(root_handlers, monkeypatch):
    monkeypatch.setattr(terminal, "REFRESH_SECONDS", 0.01)
    out = io.StringIO()
    console = Console(file=out, width=70, height=40, force_terminal=True, _environ={"TERM": "xterm"})
    status = busy()
    with TerminalView(status, console=console):
        for i in range(5):
            logging.getLogger("learner.loop").info("log line %d", i)
            print(f"printed {i}")
            logging.getLogger("absl").info("chatter %d", i)
            logging.getLogger("absl").warning("library warning %d", i)
            status.env_steps = 100_000 + i
            time.sleep(0.03)
    assert root_handlers[0] in logging.getLogger().handlers
    shown = "\n".join(screen(out.getvalue()))
    for i in range(5):
        assert shown.count(f"log line {i}") == 1
        assert shown.count(f"printed {i}") == 1
        assert shown.count(f"library warning {i}") == 1
    assert "chatter" not in shown
    assert shown.count("bsrp_pid · SafetyPointGoal1-v0") == 1
    assert "100,004 / 400,000 env steps" in shown
    assert shown.index("log line 4") < shown.index("bsrp_pid")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_plain_lines_without_a_terminal_or_with_the_view_off(root_handlers, is_terminal):
    out = io.StringIO()
    environment = {"TERM": "xterm"}
    console = Console(file=out, width=60, force_terminal=is_terminal, color_system=None, _environ=environment)
    with TerminalView(busy(), live=not is_terminal, every_seconds=0.02, console=console):
        logging.getLogger("learner.loop").info("a log line")
        time.sleep(0.1)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert sum(line.endswith("INFO a log line") for line in lines) == 1
    plain = [line for line in lines if line == status_line(busy())]
    assert 2 <= len(plain) == len(lines) - 1  # unbroken although longer than the terminal is wide


def test_a_failing_view_does_not_end_the_run(root_handlers, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(terminal, "status_line", lambda status: 1 / 0)
    view = TerminalView(busy(), every_seconds=0.01, console=Console(file=out, force_terminal=False))
    before = logging.getLogger().handlers[:]
    with view:
        view._thread.join(timeout=5.0)
        assert not view._thread.is_alive()
        assert root_handlers[0] not in logging.getLogger().handlers
    assert out.getvalue().count("the terminal view failed") == 2  # in the thread, and at the end
    assert set(logging.getLogger().handlers) == set(before)


def test_result_prints_paths_unbroken():
    out = io.StringIO()
    long = Path("/a/rather/long/path" * 8)
    result = RunResult(SUMMARY, 400_000, 12_345, 843.2, 511.3, 512.0, long, long / "curve.png")
    print_result(result, Console(file=out, width=60, force_terminal=False))
    text = out.getvalue()
    for expected in (
        "19.25 ± 2.00",
        "12.50 ± 4.00",
        "0.0125",
        "400,000",
        "12,345",
        "0:14:03",
        "511.3 (target 512)",
        f"run: {long}\n",
        f"plot: {long}/curve.png\n",
    ):
        assert expected in text
    assert max(len(line) for line in text.splitlines() if str(long) not in line) <= 60


def test_eval_table_shows_mean_and_spread():
    out, title = io.StringIO(), "a title that is wider than the table, 2,000,000 env steps"
    Console(file=out, width=80, force_terminal=False).print(eval_table(SUMMARY, title=title))
    text = out.getvalue()
    for expected in (title, "19.25 ± 2.00", "12.50 ± 4.00", "0.0125", "1,000"):
        assert expected in text
