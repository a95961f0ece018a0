"""Writers, server and samplers together: Reverb, each on its side of a real socket, and a table in memory."""

import threading
import time

import pytest

from common.config import ReplayConfig
from replay.sampler import BatchSampler
from replay.table import ReplayInfo

CONFIG = ReplayConfig(capacity=10_000)
LENGTH = 8


@pytest.fixture
def parts(kind, serve):
    """Makes a server with writers and samplers that are closed with the test."""
    made = []

    class Parts:
        def __init__(self, cfg=CONFIG, **overrides):
            self.cfg = cfg
            self.server = serve(cfg, **overrides)

        def writer(self, **arguments):
            writer = kind.writer(self.server, self.cfg, **arguments)
            made.append(lambda: writer.close(timeout=0.0))
            return writer

        def sampler(self, **arguments):
            sampler = BatchSampler(kind.source(self.server), **arguments)
            made.append(sampler.close)
            return sampler

        def settled(self) -> ReplayInfo:
            """The counts once they stand still: whoever could go on is held by the limiter."""
            infos: list[ReplayInfo] = []
            while len(infos) < 100:
                infos.append(self.server.info())
                if infos[-4:] == [infos[-1]] * 4:
                    return infos[-1]
                time.sleep(0.2)
            raise AssertionError("the limiter never held anybody")

    yield Parts
    for close in made:
        close()


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_are_contiguous_pieces_of_one_stream(parts, streams, stride):
    run = parts(ReplayConfig(capacity=10_000, stride=stride), streams=3, min_steps=60)
    sampler = run.sampler()
    writers = [run.writer(stream=stream, should_stop=sampler.ready) for stream in range(3)]
    starts = {0: set(), 1: set(), 2: set()}
    counter = 0
    while counter < 400:
        for _ in range(10):
            for stream, writer in enumerate(writers):
                writer.append(streams.make_step(stream, counter))
            counter += 1
        while (batch := sampler.next(0.05)) is not None:
            streams.check_batch(batch)
            assert batch["counter"].shape == (4, LENGTH)
            for stream, start in zip(batch["stream"][:, 0], batch["counter"][:, 0], strict=True):
                starts[int(stream)].add(int(start))
    for seen in starts.values():
        assert len(seen) > 20
        assert all(start % stride == 0 for start in seen)
    for writer in writers:
        writer.close()
        assert writer.items_lost == 0
        assert writer.appended == 400
        assert writer.items == (400 - LENGTH) // stride + 1
    assert run.server.info().inserted == sum(writer.items for writer in writers)


def test_nothing_is_sampled_before_the_prefill_and_something_after(parts, streams):
    run = parts(min_steps=40)
    writer, sampler = run.writer(), run.sampler()
    for counter in range(39):
        writer.append(streams.make_step(0, counter))
    assert sampler.next(0.7) is None
    assert sampler.server_alive
    writer.append(streams.make_step(0, 39))
    writer.close()  # completes the last chunk
    batch = sampler.next(20.0)
    assert batch is not None
    streams.check_batch(batch)


def test_the_limiter_holds_writers_back(parts, streams):
    """16 replayed steps per step in windows of 8: two samples per insert; nobody samples here."""
    run = parts(min_steps=20)
    stop = threading.Event()
    writer = run.writer(should_stop=stop.is_set)

    def act():
        for counter in range(10_000):
            if stop.is_set():
                return
            writer.append(streams.make_step(0, counter))

    actor = threading.Thread(target=act)
    actor.start()
    info = run.settled()
    paid, ahead = 13 * 2, 2 * 2 + 8 * 2  # 13 windows in 20 steps; the least width and a chunk of 8 items
    assert info.inserted == (paid + ahead) // 2
    assert info.sampled == 0
    assert actor.is_alive()
    stop.set()
    actor.join(timeout=3.0)
    assert not actor.is_alive()
    assert writer.waited_seconds > 0.3
    assert writer.appended < 100


def test_whoever_is_held_back_is_not_admitted_until_somebody_samples(parts, streams):
    """Slices of acting end, the limiter stays: what waits must not grow with every slice."""
    run = parts(min_steps=20)
    until = [time.monotonic() + 60]
    writer = run.writer(should_stop=lambda: time.monotonic() > until[0])
    counter = 0
    for _ in range(8):
        until[0] = time.monotonic() + 0.5
        while writer.admit() and time.monotonic() < until[0]:
            writer.append(streams.make_step(0, counter))
            counter += 1
    held = counter
    assert held < 20 + 8 * 8  # the prefill, and a few chunks
    for _ in range(3):
        until[0] = time.monotonic() + 0.2
        assert not writer.admit()
    sampler = run.sampler()
    until[0] = time.monotonic() + 60
    while sampler.next(0.5) is not None:
        pass
    assert writer.admit()
    writer.append(streams.make_step(0, counter))
    until[0] = 0.0


def test_the_limiter_holds_samplers_back(kind, parts, streams):
    run = parts(min_steps=20)
    writer, sampler = run.writer(), run.sampler()
    for counter in range(24):
        writer.append(streams.make_step(0, counter))
    writer.close()
    batches = 0
    while sampler.next(1.0) is not None:
        batches += 1
    info = run.settled()
    assert info.inserted == 17
    paid, ahead = 13 * 2, 3 * 4 + 2 * 16 + 2
    allowed = 17 * 2 - (paid - ahead)  # (17 - 13) x 2 and what may be prefetched
    assert info.sampled == (allowed // 4 * 4 if kind.draws_whole_batches else allowed)
    assert batches == info.sampled // 4
    assert sampler.waited_seconds >= 1.0


def test_the_realised_ratio_is_the_one_asked_for(parts, streams):
    run = parts(min_steps=100)
    writer, sampler = run.writer(), run.sampler()
    done = threading.Event()

    def act():
        for counter in range(1500):
            writer.append(streams.make_step(0, counter))
        writer.close()
        done.set()

    threading.Thread(target=act, daemon=True).start()
    while not done.is_set():
        sampler.next(0.1)
    replayed = sampler.batches * 4 * LENGTH
    assert replayed / (1500 - 100) == pytest.approx(16.0, rel=0.05)


def test_one_thread_can_act_and_learn_by_turns(parts, streams):
    """The inline backend: a writer that is held back lets go as soon as there is something to learn from."""
    run = parts(streams=4, train_ratio=128.0, min_steps=100)
    sampler = run.sampler()
    writers = [run.writer(stream=stream, should_stop=sampler.ready) for stream in range(4)]
    for counter in range(120):
        for stream, writer in enumerate(writers):
            writer.append(streams.make_step(stream, counter))
        while (batch := sampler.next(0.0)) is not None:  # so hasty that acting runs ahead
            streams.check_batch(batch)
    while (batch := sampler.next(0.5)) is not None:
        streams.check_batch(batch)
    for writer in writers:
        writer.close()
        assert writer.items_lost == 0
    while sampler.next(0.5) is not None:
        pass
    assert sampler.batches * 4 * LENGTH / (4 * 120 - 100) == pytest.approx(128.0, rel=0.1)


def test_the_transform_runs_in_the_thread(parts, streams):
    run = parts()
    writer = run.writer()
    for counter in range(30):
        writer.append(streams.make_step(0, counter))
    sampler = run.sampler(transform=lambda batch: (threading.current_thread().name, batch["stream"].sum()))
    assert sampler.next(20.0) == ("replay-sampler", 0)


def test_what_goes_wrong_in_the_thread_reaches_the_learner(parts, streams):
    def fail(batch):
        raise ZeroDivisionError("transform")

    run = parts()
    writer = run.writer()
    for counter in range(30):
        writer.append(streams.make_step(0, counter))
    sampler = run.sampler(transform=fail)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="transform"):
            sampler.next(20.0)


def test_close_never_hangs(parts):
    """On an empty table the thread waits, with Reverb inside of it, where nothing can reach it."""
    sampler = parts().sampler()
    assert sampler.next(0.3) is None
    started = time.monotonic()
    sampler.close()
    assert time.monotonic() - started < 2.0
    with pytest.raises(RuntimeError, match="closed"):
        sampler.next(1.0)


def test_a_wrong_first_step_is_refused(parts, streams):
    writer = parts().writer()
    with pytest.raises(ValueError, match="missing: \\['image'\\]"):
        writer.append({k: v for k, v in streams.make_step(0, 0).items() if k != "image"})
