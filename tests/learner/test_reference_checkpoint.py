"""Published checkpoints are read exactly; hostile, damaged and huge ones are refused, and run nothing."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from common.types import UserError
from learner import pickle_machine
from learner.reference_checkpoint import read
from tests import published

AUTHORS = Path(__file__).parent / "data" / "osrp_vector.ckpt"  # written by the published code
MODEL_OPT = "agent/wm/model_opt/state"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a file of these bytes, or of the pickle of this object."""

    def write(content: Any, protocol: int = 4) -> Path:
        path = tmp_path / "some.ckpt"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return write


def small(**changes: Any) -> dict[str, Any]:
    """The smallest checkpoint that can be read."""
    return {"step": 3, "agent": {"agent/a": np.arange(6, dtype=np.float32).reshape(2, 3)}} | changes


def adam(count: Any = None, mu: Any = None, nu: Any = None) -> Any:
    count = np.asarray(5, np.int32) if count is None else count
    one = {"agent/a": np.ones(3, np.float32)}
    return optax.ScaleByAdamState(count, one if mu is None else mu, one if nu is None else nu)


def with_state(state: Any) -> dict[str, Any]:
    return small(agent={MODEL_OPT: state})


class Watch:
    """Hears what Python is asked to do: imports, calls of the system, compilation, sockets, files."""

    def __init__(self) -> None:
        self._on, self._events = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, _: Any) -> None:
        if self._on and event != "open":
            self._events.append(event)

    @contextmanager
    def nothing_happens(self) -> Iterator[None]:
        modules = set(sys.modules)
        self._events, self._on = [], True
        try:
            yield
        finally:
            self._on = False
        assert self._events == []
        assert set(sys.modules) == modules


WATCH = Watch()


def refusal(path: Path, **options: Any) -> str:
    """The sentence with which a file is refused, while nothing else happens than that it is read."""
    with WATCH.nothing_happens(), pytest.raises(UserError) as caught:
        read(path, **options)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


# --- what is read -------------------------------------------------------------------------------


def test_the_authors_own_file_holds_what_was_recorded():
    checkpoint = read(AUTHORS)
    assert checkpoint.step == 1234
    expected = published.variables("osrp_vector")
    assert checkpoint.variables.keys() == expected.keys()
    for name, value in expected.items():
        assert checkpoint.variables[name].dtype == value.dtype
        np.testing.assert_array_equal(checkpoint.variables[name], value)
    assert {name: (state.count, len(state.mu)) for name, state in checkpoint.optimizers.items()} == {
        "agent/task_behavior/ac/actor_opt/state": (0, 10),
        "agent/task_behavior/critic/critic_opt/state": (0, 8),
        MODEL_OPT: (0, 47),
    }


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("method", ["bsrp_lag", "osrp_lag", "osrp_vector", "dreamerv3"])
def test_variables_and_moments_are_read_exactly(file, method, protocol):
    content = published.content(method)
    checkpoint = read(file(content, protocol))
    assert checkpoint.step == published.STEP
    assert checkpoint.variables.keys() | checkpoint.optimizers.keys() == content["agent"].keys()
    for name, value in checkpoint.variables.items():
        np.testing.assert_array_equal(value, content["agent"][name])
    for name, state in checkpoint.optimizers.items():
        _, expected, _ = content["agent"][name]
        assert state.count == 7
        for ours, theirs in ((state.mu, expected.mu), (state.nu, expected.nu)):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                np.testing.assert_array_equal(ours[key], value)


def test_the_wrapping_of_half_precision_runs_is_taken_off(file):
    finite = optax.ApplyIfFiniteState(
        np.asarray(0, np.int32),  # pyright: ignore
        np.asarray(True),  # pyright: ignore
        np.asarray(0, np.int32),  # pyright: ignore
        (optax.EmptyState(), adam(), optax.EmptyState()),
    )
    assert read(file(with_state(finite))).optimizers[MODEL_OPT].count == 5
    old_place = pickle.dumps(with_state(finite), 4).replace(
        b"\x8c\x20optax.transforms._conditionality", b"\x8c\x13optax._src.wrappers"
    )
    # The frame's length no longer fits; only the length of values matters.
    assert read(file(old_place)).optimizers[MODEL_OPT].count == 5


def test_arrays_keep_order_type_and_scalars(file):
    arrays = {
        "fortran": np.asfortranarray(np.arange(12.0, dtype=np.float32).reshape(3, 4)),
        "half": np.arange(4, dtype=np.float16),
        "int": np.int32(4),
        "flag": np.asarray(True),
    }
    for protocol in (4, 5):
        variables = read(file(small(agent=arrays), protocol)).variables
        for name, value in arrays.items():
            assert variables[name].dtype == value.dtype
            np.testing.assert_array_equal(variables[name], value)


def test_reading_takes_little_more_memory_than_the_file(file):
    arrays = {str(i): np.full((1000, 500), i, np.float32) for i in range(10)}
    path = file(small(agent=arrays))
    tracemalloc.start()
    try:
        checkpoint = read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(checkpoint.variables) == 10
    assert peak < 1.3 * path.stat().st_size


# --- hostile files ------------------------------------------------------------------------------


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that a hostile pickle would make."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists()


def strings(*words: str) -> bytes:
    return b"".join(pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in words)


def name(module: str, attribute: str) -> bytes:
    return strings(module, attribute) + pickle.STACK_GLOBAL


def proto(*parts: bytes) -> bytes:
    return b"".join((pickle.PROTO + b"\x04", *parts, pickle.STOP))


RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")
EMPTY_ARGUMENTS = pickle.BININT1 + b"\0" + pickle.TUPLE1 + pickle.SHORT_BINBYTES + b"\x01b" + pickle.TUPLE3
FLOAT32 = name("numpy", "dtype") + strings("f4") + b"\x89\x88\x87R"
BYTES8 = pickle.SHORT_BINBYTES + b"\x08" + bytes(8)


def test_calls_are_refused_by_name(file, marker):
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    for hostile, named in [
        (Calls(os.system, touch), "posix.system"),
        (Calls(eval, code), "builtins.eval"),
        (Calls(exec, code), "builtins.exec"),
        (Calls(getattr, "text", "upper"), "builtins.getattr"),
        (Calls(open, str(marker), "w"), "io.open"),
        (Calls(np.fromfile, "/etc/passwd"), "fromfile"),
        (Calls(np.load, "/etc/passwd"), "numpy.load"),
        (Calls(np.zeros, 10**12), "zeros"),
        (np.arange, "arange"),
        (np.random.default_rng(0), "numpy.random"),
        ({1, 2}, None),
        (np.array([Calls(os.system, touch)], dtype=object), "O8"),
        (np.array(["text"]), "U4"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), "V8"),
        (np.ma.masked_array([1.0]), "numpy.ma"),
        (np.matrix([[1.0]]), "numpy.matrix"),
        (np.array([1.0], ">f4"), "byte order"),
        (optax.TraceState({}), ".TraceState"),
        (complex(1, 2), "builtins.complex"),
    ]:
        for content in (hostile, small(agent=hostile), small(agent={"agent/a": hostile})):
            for protocol in (3, 4, 5):
                sentence = refusal(file(content, protocol))
                assert named is None or named in sentence


@pytest.mark.parametrize("opcodes", ["GLOBAL", "STACK_GLOBAL"])
def test_modules_are_not_even_imported(file, opcodes):
    assert "antigravity" not in sys.modules
    named = b"cantigravity\nfly\n" if opcodes == "GLOBAL" else name("antigravity", "fly")
    assert "antigravity.fly" in refusal(file(proto(named, pickle.EMPTY_TUPLE, pickle.REDUCE)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),  # protocol 0
        (b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.", "protocol 2"),
        (b"(S'true'\nios\nsystem\n.", "operation"),
        (b"(cos\nsystem\nS'true'\no.", "os.system"),
        (b"Pan id\n.", "PERSID"),
        (b"\x80\x04K\x01Q.", "BINPERSID"),
        (b"\x80\x04\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04K\x012.", "DUP"),
        (proto(name("optax._src.base", "EmptyState"), b")}\x92"), "NEWOBJ_EX"),
        (proto(RECONSTRUCT, name("numpy", "dtype"), EMPTY_ARGUMENTS, pickle.REDUCE), "admitted"),
        (proto(RECONSTRUCT, name("builtins", "list"), EMPTY_ARGUMENTS, pickle.REDUCE), "builtins.list"),
        (proto(RECONSTRUCT, name("numpy", "ndarray"), pickle.TUPLE1, pickle.REDUCE), "arguments"),
        (proto(name("numpy", "ndarray"), b"K\x05\x85R"), "ndarray"),
        (proto(name("optax._src.base", "EmptyState"), b")R"), "EmptyState"),
        (proto(name("optax._src.base", "EmptyState"), b"K\x01\x85\x81"), "arguments"),
        (proto(name("optax._src.base", "EmptyState"), b")\x81}", strings("__class__"), b"K\x01sb"), "state"),
        (proto(name("numpy", "ndarray"), b"}b"), "state"),
        (proto(name("numpy.core.multiarray", "_reconstruct.__globals__"), b")R"), "__globals__"),
        (proto(name("numpy", "core.multiarray._reconstruct"), b")R"), "core.multiarray"),
    ],
)
def test_every_other_way_in_is_closed(file, content, reason):
    assert reason in refusal(file(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"few.", "announces"),  # BINBYTES8
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"few.", "announces"),  # BYTEARRAY8
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"few.", "announces"),  # BINUNICODE8
        (b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"few.", "announces"),  # BINBYTES
        (b"\x80\x04X" + struct.pack("<I", 10_000) + b"x" * 10_000 + b".", "10,000 bytes"),  # BINUNICODE
        (b"\x80\x04\x8a\xff" + b"\x01" * 255 + b".", "whole number"),  # LONG1
        (b"\x80\x04\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6 + b".", "LONG4"),
        (b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".", "nonetype"),  # LONG_BINPUT
        (b"\x80\x04h\x05.", "refers"),  # BINGET of nothing
        (b"\x80\x04" + b")\x85" + b"\x85" * 300_000 + b".", "tuple"),  # deeply nested
        (b"\x80\x04)" + b"\x85" * 600_000 + b".", "operations"),
        (b"\x80\x04" + b"(" * 600_000 + b".", "operations"),
        (b"\x80\x04}" + b")" + b"\x94h\0\x86" * 100 + b"Ns.", "key"),  # hashing it would take 2^100 steps
        (proto(name("numpy.core.multiarray", "scalar"), FLOAT32, b"C\x08" + bytes(8), b"\x86R"), "needs 4"),
        (
            proto(
                name("numpy.core.numeric", "_frombuffer"), b"(", BYTES8, FLOAT32,
                b"J" + struct.pack("<i", 2**31 - 1), b"\x85", strings("C"), b"tR",
            ),
            "needs 8,589,934,588",
        ),
    ],
)  # fmt: skip
def test_announced_sizes_allocate_nothing(file, content, reason):
    path = file(content)
    started = time.monotonic()
    tracemalloc.start()
    try:
        assert reason in refusal(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 120e6
    assert time.monotonic() - started < 60


def test_one_array_under_many_names_counts_many_times(file):
    array = np.zeros(250_000, np.float32)
    many = small(agent={f"agent/{i}": array for i in range(200)})
    path = file(many)
    assert path.stat().st_size < 2e6
    assert "take more than" in refusal(path, max_bytes=100_000_000)


def test_memory_cannot_be_reached_through_shared_lists(file):
    looped: list[Any] = []
    looped.append(looped)
    assert "list" in refusal(file(looped))
    assert "list" in refusal(file(small(agent=looped)))
    assert "list" in refusal(file(small(agent={"agent/a": looped})))


def test_no_change_of_a_byte_leads_anywhere_else(file):
    whole = pickle.dumps(with_state((optax.EmptyState(), adam(), optax.EmptyState())), 4)
    for length in range(len(whole)):
        refusal(file(whole[:length]))
    rng = np.random.default_rng(0)
    for _ in range(3_000):
        changed = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 4)):
            changed[position] = rng.integers(256)
        try:
            read(file(bytes(changed)))
        except UserError:
            continue


def test_operations_are_those_of_a_pickler():
    """None of the admitted operations is one that imports, calls or persists by itself."""
    known = {code.code.encode("latin-1"): code.name for code in pickletools.opcodes}
    admitted = {known[code] for code in pickle_machine._OPERATIONS}
    calling = {"INST", "OBJ", "NEWOBJ_EX"}
    outside = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert not admitted & (calling | outside)


# --- damaged and wrong ones ---------------------------------------------------------------------


def test_files_that_are_none(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent.ckpt")
    assert "not a file" in refusal(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "not a file" in refusal(pipe)
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    assert "empty" in refusal(empty)
    huge = tmp_path / "huge.ckpt"
    with huge.open("wb") as file:
        file.truncate(3 << 30)
    assert "larger than" in refusal(huge)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04 some archive", "pickle"),
        (b"plain text", "pickle"),
        (pickle.dumps(small(), 4) + b"more", "4 bytes follow"),
        ([1, 2], "list"),
        (None, "nonetype"),
        ({"agent": {}}, "no `step`"),
        ({"step": 1}, "no `agent`"),
        (small(step=-1), "`step`"),
        (small(step=True), "`step`"),
        (small(step=1.5), "`step`"),
        (small(step=10**30), "whole number"),
        (small(agent=[]), "`agent` is a list"),
        (small(more=1), "'more'"),
        ({1: 2}, "key"),
        (small(agent={"agent/a": 1.0}), "float"),
        (small(agent={"agent/a": "text"}), "str"),
        (small(agent={"agent/a": {"deeper": np.ones(2)}}), "dict"),
        (small(agent={5: np.ones(2)}), "key"),
        (small(agent={"agent/a": np.array([1.0, np.nan], np.float32)}), "not finite"),
        (small(agent={"agent/a": np.array([np.inf], np.float16)}), "not finite"),
        (small(agent={"agent/a": np.ones(2, np.complex64)}), "c8"),
        (small(agent={"agent/a": np.ones((0, 3), np.float32)}), "shape"),
        (with_state(()), "Adam"),
        (with_state((optax.EmptyState(),)), "Adam"),
        (with_state((adam(), adam())), "Adam"),
        (with_state((adam(), 5)), "Adam"),
        (with_state(adam()), "Adam"),
        (with_state((adam(count=1.5),)), "count"),
        (with_state((adam(count=np.asarray(-1)),)), "count"),
        (with_state((adam(count=np.ones(2, np.int32)),)), "count"),
        (with_state((adam(mu=[]),)), "list"),
        (with_state((adam(mu={"agent/a": 1.0}),)), "float"),
        (with_state((adam(nu={"agent/a": np.array([-1.0], np.float32)}),)), "negative"),
        (with_state((adam(mu={"agent/a": np.array([np.nan], np.float32)}),)), "not finite"),
    ],
)
def test_wrong_contents_are_named(file, content, reason):
    assert reason in refusal(file(content))
