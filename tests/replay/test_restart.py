"""What survives: checkpoints, a killed server, a killed parent, a blocked sampler at exit."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.config import ReplayConfig
from common.types import ArraySpec, UserError
from replay import reverb_source, sampler, server, writer
from replay.reverb_source import ReverbSource
from replay.sampler import BatchSampler
from replay.writer import StreamWriter
from tests.stacks import needs_reverb

CONFIG = ReplayConfig(capacity=10_000)
LENGTH = 8
ROOT = Path(__file__).resolve().parents[2]


CHILD = """
import subprocess, sys, time
from common.config import ReplayConfig
from common.types import ArraySpec
from replay.process import spawn_server
from replay.reverb_source import ReverbSource
from replay.sampler import BatchSampler

signature = {"x": ArraySpec((3,))}
table = dict(batch_length=4, train_ratio=4.0, batch_size=2, min_steps=8)
server = spawn_server(signature, ReplayConfig(capacity=100), **table)
source = ReverbSource(f"localhost:{server.port}", signature, batch_size=2, batch_length=4)
sampler = BatchSampler(source)
assert sampler.next(0.3) is None
if sys.argv[1] == "exit":
    print(server.pid, flush=True)
else:  # somebody else keeps the pipe to the server open
    pipe = server._child.stdin.fileno()
    other = subprocess.Popen(["sleep", "30"], pass_fds=[pipe], stdout=subprocess.DEVNULL)
    print(server.pid, other.pid, flush=True)
    time.sleep(60)
"""


FOREIGN = """
import time
from replay import backend
from replay.server import free_ports

reverb = backend.load()
port = free_ports(1)[0]
pick, limiter = reverb.selectors.Fifo(), reverb.rate_limiters.MinSize(1)
table = reverb.Table("other", pick, pick, 10, limiter)
server = reverb.Server([table], port=port)
print(port, flush=True)
time.sleep(60)
"""


def start_child(script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def fill(kind, server, streams, steps: int, cfg=CONFIG) -> None:
    stream = kind.writer(server, cfg)
    for counter in range(steps):
        stream.append(streams.make_step(0, counter))
    stream.close()
    assert stream.items_lost == 0


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_checkpoint_round_trip_damage_and_another_definition(kind, serve, streams, tmp_path):
    directory = tmp_path / "replay"
    first = serve(checkpoint_dir=directory)
    assert first.restored is None
    fill(kind, first, streams, 25)
    older = first.checkpoint()
    fill(kind, first, streams, 10)
    newer = first.checkpoint()
    before = first.info()
    assert before.size == 18 + 3
    first.stop()

    second = serve(checkpoint_dir=directory)
    assert second.restored == newer
    assert second.info() == before  # the counts, and with them the ratio, continue
    batches = BatchSampler(kind.source(second))
    batch = batches.next(20.0)
    assert batch is not None
    streams.check_batch(batch)
    batches.close()
    second.stop()

    with pytest.raises(UserError, match=r"another max_size.*replay\.capacity"):
        serve(ReplayConfig(capacity=500), checkpoint_dir=directory)
    with pytest.raises(UserError, match=r"another samples_per_insert.*learner\.train_ratio"):
        serve(checkpoint_dir=directory, train_ratio=8.0)

    biggest = max(newer.iterdir(), key=lambda file: file.stat().st_size)
    biggest.write_bytes(b"damaged")
    third = serve(checkpoint_dir=directory)
    assert third.restored == older
    assert third.info().size == 18
    assert len(third.messages) == 1
    assert str(newer) in third.messages[0]


def test_a_server_process_ends_by_itself(serve_reverb):
    server = serve_reverb()
    server.stop()
    assert not server.alive()
    assert server._child.returncode == 0


def test_writer_and_sampler_outlive_a_killed_server(reverb, serve_reverb, streams, tmp_path, monkeypatch):
    serve = serve_reverb
    monkeypatch.setattr(sampler, "_PROBE_SECONDS", 0.3)
    monkeypatch.setattr(reverb_source, "_PROBE_SECONDS", 0.3)
    monkeypatch.setattr(writer, "_PROBE_SECONDS", 0.3)
    cfg = CONFIG
    first = serve(cfg, checkpoint_dir=tmp_path / "replay")
    stop = threading.Event()
    stream = reverb.writer(first, cfg, should_stop=stop.is_set)
    batches = BatchSampler(reverb.source(first))

    def act():
        counter = 0
        while not stop.is_set():
            stream.append(streams.make_step(0, counter))
            counter += 1

    actor = threading.Thread(target=act)
    actor.start()
    try:
        for _ in range(10):
            assert batches.next(20.0) is not None
        first.checkpoint()
        os.kill(first.pid, signal.SIGKILL)
        assert wait_until(lambda: not first.alive(), 5.0)
        while batches.next(1.5) is not None:  # what was prefetched
            pass
        assert not batches.server_alive
        stuck = stream.appended
        time.sleep(0.5)
        assert stream.appended == stuck  # acting waits, nothing is dropped
        with pytest.raises(RuntimeError, match="gone"):
            first.info()

        second = serve(cfg, checkpoint_dir=tmp_path / "replay", port=first.port)
        assert second.port == first.port
        newest = 0
        deadline = time.monotonic() + 20.0
        while newest <= stuck + 2 * LENGTH and time.monotonic() < deadline:
            batch = batches.next(1.0)
            if batch is not None:
                streams.check_batch(batch)
                newest = max(newest, int(batch["counter"].max()))
        assert newest > stuck + 2 * LENGTH
        assert batches.server_alive
        assert stream.items_lost == 0
        assert stream.waited_seconds > 0.5
    finally:
        stop.set()
        actor.join(timeout=5.0)
        stream.close(timeout=0.0)
        batches.close()
    assert not actor.is_alive()


@needs_reverb
def test_a_server_without_our_table_is_an_error_not_a_wait(monkeypatch, streams):
    """Somebody else's Reverb on the port: it answers, and will never take our items."""
    monkeypatch.setattr(writer, "_MAX_REOPENS", 1)
    monkeypatch.setattr(reverb_source, "_MAX_RETRIES", 1)
    foreign = start_child(FOREIGN)
    assert foreign.stdout is not None
    port = int(foreign.stdout.readline())
    stream = StreamWriter(f"localhost:{port}", streams.signature, ReplayConfig(), LENGTH)
    source = ReverbSource(f"localhost:{port}", streams.signature, batch_size=4, batch_length=LENGTH)
    batches = BatchSampler(source)

    def act():
        for counter in range(500):
            stream.append(streams.make_step(0, counter))

    with pytest.raises(RuntimeError, match=r"refuses the stream.*replay was not found"):
        act()
    assert stream.items_lost > 0
    with pytest.raises(RuntimeError, match="replay was not found"):
        batches.next(10.0)
    batches.close()
    foreign.kill()
    foreign.communicate()


def test_a_port_in_use_is_refused(serve_reverb, monkeypatch):
    monkeypatch.setattr(server, "_PORT_SECONDS", 0.3)
    running = serve_reverb()
    with pytest.raises(UserError, match=rf"Port {running.port} .* --replay.port"):
        server.ReplayServer(
            {"x": ArraySpec((3,))},
            CONFIG,
            batch_length=4,
            train_ratio=4.0,
            batch_size=2,
            min_steps=8,
            port=running.port,
        )


@needs_reverb
def test_a_blocked_sampler_does_not_keep_the_process_alive():
    child = start_child(CHILD, "exit")
    output, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert wait_until(lambda: not Path(f"/proc/{int(output)}").exists(), 8.0)


@needs_reverb
def test_the_server_dies_with_its_parent():
    child = start_child(CHILD, "hang")
    assert child.stdout is not None
    pid, other = map(int, child.stdout.readline().split())
    assert Path(f"/proc/{pid}").exists()
    child.kill()
    child.wait()
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10.0)
    os.kill(other, signal.SIGKILL)
    child.communicate()
