import json
import logging
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import metrics, sinks
from common.config import LoggingConfig
from common.metrics import METRICS, Aggregator, MetricsWriter, cut_back, summarize_episodes
from common.sinks import JsonlSink, TensorBoardSink, panel_name, read_jsonl, truncate_jsonl
from common.types import EpisodeResult, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
FILES_ONLY = LoggingConfig(tensorboard=False, wandb="off")


def strict_rows(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def episode(return_: float, cost: float, length: int = 1000) -> EpisodeResult:
    return EpisodeResult(return_=return_, cost=cost, length=length, version=3, source="actor0/env1")


def test_aggregator_means_totals_and_last_values():
    aggregator = Aggregator()
    aggregator.mean({"loss/model": 2.0, "loss/actor": np.float32(1.5)})
    aggregator.mean({"loss/model": 5.0})
    aggregator.last({"safety/multiplier": 0.1})
    aggregator.last({"safety/multiplier": 0.2})
    aggregator.count("actors/restarts")
    aggregator.count("actors/restarts", 2)
    expected = {"loss/model": 3.5, "loss/actor": 1.5, "safety/multiplier": 0.2, "actors/restarts": 3}
    assert aggregator.pop() == expected
    aggregator.mean({"loss/model": 1.0})
    assert aggregator.pop() == {"loss/model": 1.0, "actors/restarts": 3}


def test_summary_of_episodes_by_hand():
    summary = summarize_episodes([episode(10.0, 4.0, 1000), episode(14.0, 0.0, 600)])
    assert summary == {
        "eval/episodes": 2,
        "eval/return": 12.0,
        "eval/return_std": 2.0,
        "eval/return_ci": pytest.approx(12.706 * 2.0, rel=1e-4),  # t of one degree of freedom
        "eval/cost_ci": pytest.approx(12.706 * 2.0, rel=1e-4),
        "eval/cost": 2.0,
        "eval/cost_std": 2.0,
        "eval/cost_rate": 4 / 1600,
        "eval/length": 800.0,
    }


def test_panels_group_quantities():
    names = {
        "train/return": "reward/train",
        "eval/return": "reward/eval",
        "eval/return_std": "reward/eval_std",
        "train/cost": "cost/train",
        "eval/cost_std": "cost/eval_std",
        "train/cost_rate": "cost_rate/train",
        "eval/cost_rate": "cost_rate/eval",
        "safety/multiplier": "multiplier/multiplier",
        "eval/length": "eval/length",
        "loss/cost": "loss/cost",
        "unnamed": "unnamed",
    }
    assert {name: panel_name(name) for name in names} == names


def test_rows_are_strict_json_and_on_disk_at_once(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(7, {"a": float("nan"), "b": -math.inf, "c": np.float32(0.5), "d": np.int32(3), "e": "x"})
    text = (tmp_path / "m.jsonl").read_text()
    assert text == '{"env_steps": 7, "a": null, "b": null, "c": 0.5, "d": 3, "e": "x"}\n'


def test_a_run_writes_its_rows(tmp_path):
    writer = MetricsWriter(tmp_path, FILES_ONLY, {})
    writer.evaluation(0, summarize_episodes([episode(-1.0, 50.0)]))
    writer.episode(1000, episode(2.0, 30.0, 1000))
    writer.episode(1500, episode(4.0, 0.0, 500))
    writer.write(1600, {"loss/model": 3.0})
    writer.write(2000, {"loss/model": 2.0})
    writer.close()
    first, second, third = strict_rows(tmp_path / metrics.METRICS)
    assert all(row.pop("wall_seconds") >= 0 for row in (first, second, third))
    assert (first["env_steps"], first["eval/cost"]) == (0, 50.0)
    expected = {"train/return": 3.0, "train/cost": 15.0, "train/length": 750.0, "train/cost_rate": 0.02}
    assert second == {"env_steps": 1600, "loss/model": 3.0, **expected}
    assert third == {"env_steps": 2000, "loss/model": 2.0}
    rows = strict_rows(tmp_path / metrics.EPISODES)
    tail = {"version": 3, "source": "actor0/env1"}
    assert rows[0] == {"env_steps": 1000, "return": 2.0, "cost": 30.0, "length": 1000, **tail}
    assert [row["env_steps"] for row in rows] == [1000, 1500]


def test_truncate_drops_later_rows_and_half_written_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"env_steps": 10}\n{"env_steps": 30}\nbroken\n{"env_steps": 20}\n{"env_steps": 20, "a": 1.'
    )
    assert truncate_jsonl(path, 20) == 3
    assert path.read_text() == '{"env_steps": 10}\n{"env_steps": 20}\n'
    path.write_text('{"env_steps": 10}\n{"env_steps": 15}')  # complete but for its line end
    assert truncate_jsonl(path, 20) == 0
    assert path.read_text() == '{"env_steps": 10}\n{"env_steps": 15}\n'
    assert truncate_jsonl(tmp_path / "none.jsonl", 20) == 0


def test_rows_of_updates_after_the_checkpoint_go_although_nobody_acted(tmp_path):
    path = tmp_path / METRICS
    rows = [{"env_steps": 20, "train/updates": updates} for updates in (7, 8, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"env_steps": 20, "eval/return": 1}]))
    cut_back(tmp_path, 20, updates=8)
    assert read_jsonl(path) == [*rows[:2], {"env_steps": 20, "eval/return": 1}]
    cut_back(tmp_path, 19)
    assert read_jsonl(path) == []
    assert not (tmp_path / "none.jsonl").exists()


def test_reading_leaves_out_a_half_written_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"env_steps": 1}\n{"env_steps": 2, "x": "\xff\xfe')
    assert read_jsonl(path) == [{"env_steps": 1}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_resuming_continues_the_curve_without_doubling(tmp_path):
    writer = MetricsWriter(tmp_path, FILES_ONLY, {})
    for step in (100, 200, 300, 400):
        writer.episode(step, episode(step, 0.0))
        writer.write(step, {})
    del writer  # killed: half a line is left
    with open(tmp_path / metrics.METRICS, "a") as file:
        file.write('{"env_steps": 450, "wall')
    rows = read_jsonl(tmp_path / metrics.METRICS)
    rows[1]["wall_seconds"] = 5000.0
    (tmp_path / metrics.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = MetricsWriter(tmp_path, FILES_ONLY, {}, resume_env_steps=200)
    resumed.episode(260, episode(260.0, 0.0))
    resumed.write(260, {})
    resumed.close()
    rows = strict_rows(tmp_path / metrics.METRICS)
    assert [row["env_steps"] for row in rows] == [100, 200, 260]
    assert 5000.0 <= rows[2]["wall_seconds"] < 5060.0  # the clock runs on from the last kept row
    assert [row["env_steps"] for row in strict_rows(tmp_path / metrics.EPISODES)] == [100, 200, 260]


def test_a_used_directory_is_refused_without_resume(tmp_path):
    writer = MetricsWriter(tmp_path, FILES_ONLY, {})
    writer.write(1, {})
    writer.close()
    with pytest.raises(UserError, match="--resume"):
        MetricsWriter(tmp_path, FILES_ONLY, {})
    MetricsWriter(tmp_path, FILES_ONLY, {}, resume_env_steps=0).close()


class FullDisk:
    def write(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    flush = close = write


def test_a_failing_metrics_file_is_an_error_for_the_user(tmp_path):
    writer = MetricsWriter(tmp_path, FILES_ONLY, {})
    writer._metrics_file._file = FullDisk()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device"):
        writer.write(1, {"loss/model": 1.0})
    writer.close()  # still closes
    (tmp_path / "directory" / metrics.METRICS).mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        MetricsWriter(tmp_path / "directory", FILES_ONLY, {}, resume_env_steps=None)


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def write(self, env_steps: int, values: object) -> None:
        self.calls += 1
        raise ConnectionError("no network")

    def close(self) -> None:
        raise ConnectionError("no network")


def test_another_failing_sink_warns_once_and_is_switched_off(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, FILES_ONLY, {})
    broken = Broken()
    writer._optional["W&B"] = broken
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            writer.write(step, {"loss/model": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "W&B failed and is switched off: no network"
    ]
    assert broken.calls == 1
    writer._optional["W&B"] = Broken()
    writer.close()
    assert len(strict_rows(tmp_path / metrics.METRICS)) == 3


def test_a_sink_that_cannot_start_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file in the way")
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), {})
    writer.write(1, {"loss/model": 1.0})
    writer.close()
    assert "TensorBoard could not be started" in caplog.text


def tensorboard_events(directory: Path) -> list:
    """All events of all files, oldest file first; the record frames are read by hand."""
    from tensorboard.compat.proto import event_pb2

    events = []
    for file in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + size :]
    return events


def test_tensorboard_events_hold_the_scalars(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(500, {"eval/cost": 3.5, "loss/model": float("nan")})
    version, scalars = tensorboard_events(tmp_path)  # before close: written at once
    assert version.file_version == "brain.Event:2"
    assert scalars.step == 500
    found = {value.tag: value.simple_value for value in scalars.summary.value}
    assert found["cost/eval"] == 3.5
    assert math.isnan(found["loss/model"])
    sink.close()
    resumed = TensorBoardSink(tmp_path, resume_env_steps=400)
    resumed.close()
    start = tensorboard_events(tmp_path)[-1]
    assert (start.session_log.status, start.step) == (1, 401)  # START: rows from 401 on are hidden


def run_python(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process without any W&B login."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    own = {"PYTHONPATH": str(REPOSITORY), "HOME": str(home), "NETRC": str(home / "netrc")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **own, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_importing_and_tensorboard_need_no_heavy_libraries(tmp_path):
    code = """
import sys
from pathlib import Path
import common.metrics
heavy = [m for m in ("jax", "wandb", "tensorboard", "matplotlib") if m in sys.modules]
from common.sinks import TensorBoardSink
TensorBoardSink(Path("tb")).write(1, {"a": 1.0})
print(heavy, "tensorflow" in sys.modules)
"""
    assert run_python(code, tmp_path).stdout.strip() == "[] False"


WANDB_RUN = """
from pathlib import Path
from common.config import LoggingConfig
from common.metrics import MetricsWriter
cfg = LoggingConfig(tensorboard=False, wandb="offline", wandb_project="project")
for resume, steps in ((None, (100, 200)), (100, (150,))):
    writer = MetricsWriter(Path("run"), cfg, {"seed": 5, "cap": float("inf")}, resume_env_steps=resume)
    for step in steps:
        writer.write(step, {"train/return": step / 10, "safety/multiplier": 0.5})
    writer.close()
"""


def wandb_records(file: Path) -> list:
    """What W&B wrote for `wandb sync`: after 7 bytes of its own a log of LevelDB's form, in blocks of 32 KiB.

    W&B's own reader is gone since 0.31.
    """
    from wandb.proto import wandb_internal_pb2 as proto

    data, at, parts, records = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at < len(data):
        in_block = 2**15 - at % 2**15
        if in_block < 7:  # too little for a header
            at += in_block
            continue
        _, length, kind = struct.unpack_from(
            "<IHB", data, at
        )  # checksum, bytes that follow, place in the record
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            record = proto.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def test_wandb_offline_is_silent_complete_and_resumes_its_id(tmp_path):
    done = run_python(WANDB_RUN, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run_id = (tmp_path / "run" / "wandb" / "run_id.txt").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    rows, config, x_axes = [], {}, {}
    for record in (record for file in files for record in wandb_records(file)):
        if record.HasField("history"):
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item})
        if record.HasField("run"):
            config.update({item.key: item.value_json for item in record.run.config.update})
            assert record.run.project == "project"
        if record.HasField("metric"):
            x_axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    found = [(row["env_steps"], row["reward/train"], row["multiplier/multiplier"]) for row in rows]
    assert found == [(100, 10.0, 0.5), (200, 20.0, 0.5), (150, 15.0, 0.5)]
    assert config["seed"] == "5"
    assert x_axes["*"] == "env_steps"


WANDB_ONLINE = """
import logging, sys
from pathlib import Path
from common import sinks
from common.config import LoggingConfig
from common.metrics import MetricsWriter
logging.basicConfig(stream=sys.stdout, format="%(message)s")
sinks.WANDB_TIMEOUT = 2.0
writer = MetricsWriter(Path("run"), LoggingConfig(tensorboard=False, wandb="online"), {})
writer.write(1, {"loss/model": 1.0})
writer.close()
"""


def test_wandb_online_without_a_login_says_what_to_do(tmp_path):
    done = run_python(WANDB_ONLINE, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "common.types.UserError: W&B is set to online, but nobody is logged in: run `wandb login`"
    )
    assert "--wandb offline" in last


@pytest.mark.slow
def test_wandb_out_of_reach_does_not_stop_training(tmp_path):
    """Port 9 of this machine answers nobody: neither the start nor the end of the process may hang."""
    login = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_python(WANDB_ONLINE, tmp_path, **login)
    assert done.returncode == 0
    assert "W&B could not be started; training goes on without it" in done.stdout
    assert len(strict_rows(tmp_path / "run" / metrics.METRICS)) == 1
    assert "a" * 40 not in done.stdout + done.stderr


def test_an_action_is_bounded_in_time():
    assert sinks._within(5.0, lambda: 3) == 3
    with pytest.raises(KeyError):
        sinks._within(5.0, lambda: {}["x"])
    import threading

    with pytest.raises(TimeoutError, match=r"0.05 s"):
        sinks._within(0.05, threading.Event().wait)
