"""What `submit` and `job` refuse before they ask a cluster for anything, and what they ship."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.configuration import dump
from common.types import UserError
from deploy import jobs, joining
from deploy.cli import main
from deploy.submit import _ship_files

NOWHERE = "http://127.0.0.1:1"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("safedreamer: ")
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("submit", "stands after --"),
        ("submit --", "only `train` runs as a job, not nothing"),
        ("submit -- eval x", "only `train` runs as a job, not eval"),
        ("submit --adress x -- train", "did you mean `--address`?"),
        ("submit --nowait -- train", "did you mean `--no-wait`?"),
        ("submit -- train", "give --run-dir: an absolute path"),
        ("submit -- train --run-dir here", "must be an absolute path, not here"),
        ("submit --run-dir here -- train", "must be an absolute path, not here"),
        ("submit --run-dir /x -- train --run-dir /y", "one run directory"),
        ("submit --run-dir /x -- train --resume /nowhere/y", "one run directory"),
        ("submit -- train --resume here", "--resume must be an absolute path on the cluster's storage"),
        ("submit -- train --resume /nowhere/x --env-stepss 1", "did you mean `--env-steps`?"),
        ("submit -- train --run-dir /x --env-stepss 1", "did you mean `--env-steps`?"),
        ("submit -- train --run-dir /x --task SafetyPintGoal1-v0", "Did you mean SafetyPointGoal1-v0"),
        ("submit -- train --run-dir /x --backend inline", "backend inline is one process"),
        ("submit -- train --run-dir /x --ray-address auto", "leave out --ray-address"),
        ("submit -- train --run-dir /x --print-config", "needs no cluster"),
        ("submit -- train --run-dir /x --config nothere.yaml", "there is no configuration file nothere.yaml"),
        ("submit --submission-id a/b -- train --run-dir /x", "letters, digits"),
        (f"submit --address {NOWHERE} -- train --run-dir /x", f"no Ray dashboard answers at {NOWHERE}"),
        ("submit --address head:8265 -- train --run-dir /x", "e.g. http://HEAD:8265, not head:8265"),
        (f"job list --address {NOWHERE}", "no Ray dashboard answers"),
        ("job stop", "name the job: safedreamer job stop ID"),
        ("job foo", "invalid choice 'foo'"),
        ("train --ray-address ray://head:10001", "safedreamer submit --address"),
        ("train --ray-address auto --backend inline", "backend inline is one process"),
    ],
)
def test_refusals(capsys, arguments, sentence):
    assert sentence in refusal(capsys, *arguments.split())


@pytest.fixture
def not_ray() -> Iterator[int]:
    """The port of a web server that knows nothing of Ray."""

    class Silent(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_another_service_is_no_cluster(not_ray, capsys):
    assert "no Ray dashboard" in refusal(capsys, "job", "list", "--address", f"http://127.0.0.1:{not_ray}")
    with pytest.raises(UserError, match="there is no Ray cluster at"):
        joining._probe(f"127.0.0.1:{not_ray}", "given")


def test_a_wrong_address_is_refused(monkeypatch):
    with pytest.raises(UserError, match="there is no Ray cluster"):
        joining._probe("127.0.0.1:1", "127.0.0.1:1")
    for wrong in ("head", "http://head:6379", "head:port", ":6379"):
        with pytest.raises(UserError, match="must be HOST:PORT"):
            joining._resolve(wrong)
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")  # as in a job
    assert joining._resolve("auto") == "10.1.2.3:6379"


def test_config_files_travel_along(tmp_path: Path, tiny_config):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(dump(tiny_config()))
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    words = ["--config", a, b, "--seed", "1", f"--config={a}", "--task", a]
    there = ["given/0-a.yaml", "given/1-b.yaml"]
    assert _ship_files(words, shipped) == [
        *["--config", *there, "--seed", "1", "--config=given/2-a.yaml", "--task", a]
    ]
    assert all((shipped / name).is_file() for name in there)


def test_a_stopped_job_has_time_to_save():
    from deploy.saving import SAVE_REPLAY_SECONDS, SAVE_SECONDS

    assert jobs.STOP_SECONDS >= SAVE_SECONDS + SAVE_REPLAY_SECONDS
