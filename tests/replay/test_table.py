import numpy as np
import pytest

from common.config import ReplayConfig
from common.types import ArraySpec, EnvSpec, UserError, replay_spec
from replay.memory.table import MemoryTable
from replay.table import Layout, frames_bytes, memory_ceiling, reverb_ceiling, table_spec

CONFIG = ReplayConfig(capacity=1000)
SIGNATURE = replay_spec(EnvSpec("task", {"vector": ArraySpec((29,))}, 2, 5, 1000))


def build(cfg=CONFIG, **overrides):
    arguments = {"batch_length": 16, "train_ratio": 32.0, "batch_size": 8, "min_steps": 100} | overrides
    return table_spec(SIGNATURE, cfg, **arguments)


def test_limiter_numbers_by_hand():
    spec = build()
    assert (spec.max_size, spec.min_size, spec.samples_per_insert) == (1000, 85, 2.0)  # 85 = 100 - 16 + 1
    low, high = spec.error_range  # 85 items pay for 170 samples
    assert low == 170 - (3 * 8 + 2 * 16 + 2)  # 3 batches, 2 x 16 single samples, one insert's worth
    assert high == 170 + 2 * 2 + 16 * 2  # the least Reverb allows, and a chunk of 16 items


def test_stride_makes_fewer_items_that_are_replayed_more_often():
    spec = build(ReplayConfig(capacity=1000, stride=4))
    assert (spec.max_size, spec.samples_per_insert) == (250, 8.0)
    assert spec.min_size == 22  # windows end at steps 16, 20, ... 100


def test_prefill_counts_the_steps_of_all_streams_together():
    assert build(min_steps=160, streams=8).min_size == 8 * (20 - 16 + 1)
    assert build(min_steps=1, streams=3).min_size == 3  # never less than one window per stream


@pytest.mark.parametrize("streams", [1, 8, 200])
@pytest.mark.parametrize("ratio", [0.5, 32.0, 1024.0])
def test_neither_side_can_block_the_other_for_good(streams, ratio):
    spec = build(ReplayConfig(), train_ratio=ratio, streams=streams)
    low, high = spec.error_range
    assert high - low >= 2 * max(1.0, spec.samples_per_insert)
    assert high >= spec.min_size * spec.samples_per_insert  # else nothing could be sampled after the prefill


def test_a_table_that_could_never_be_sampled_is_refused():
    with pytest.raises(UserError, match=r"replay.capacity is 50 .* at least 85"):
        build(ReplayConfig(capacity=50))


def test_small_arrays_share_one_row_and_images_do_not():
    assert Layout(SIGNATURE).num_columns == 1
    assert Layout({**SIGNATURE, "image": ArraySpec((64, 64, 3), "uint8")}).num_columns == 2


def test_layout_round_trip(streams):
    layout = Layout(streams.signature)
    columns = layout.empty(2, 5)
    for row in range(2):
        for time in range(5):
            for column, value in zip(columns, layout.pack(streams.make_step(row, 3 + time)), strict=True):
                column[row, time] = value
    batch = layout.unpack(columns)
    streams.check_batch(batch)
    assert (batch["counter"] == np.arange(3, 8)).all()
    assert all(array.flags.c_contiguous for array in batch.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": np.zeros(4, np.float32)}, r"'vector' as float32\[3\].*float32\[4\]"),
        ({"vector": np.zeros(3, np.float64)}, r"'vector' as float32\[3\].*float64\[3\]"),
        ({"speed": np.float32(0)}, r"unknown: \['speed'\]"),
    ],
)
def test_a_step_that_does_not_fit_is_named(streams, change, message):
    with pytest.raises(ValueError, match=message):
        Layout(streams.signature).check({**streams.make_step(0, 0), **change})


def test_memory_ceiling_bounds_what_was_measured():
    """Resident megabytes of the server per million steps (29 floats, 2 actions), as measured."""
    for length, stride, measured in [(16, 1, 786), (64, 1, 1039), (16, 4, 315), (64, 4, 438)]:
        ceiling = reverb_ceiling(SIGNATURE, ReplayConfig(stride=stride), length) / 2**20
        assert measured < ceiling < 2.2 * measured


@pytest.mark.parametrize(("streams", "stride"), [(1, 1), (8, 4)])
def test_memory_ceiling_bounds_what_a_table_takes(streams, stride):
    cfg = ReplayConfig(capacity=100_000, stride=stride)
    table = MemoryTable(build(cfg), streams, compressed=False)
    arrays = [array for lane in table.lanes for array in (*lane.columns, lane.starts)]
    taken, ceiling = sum(array.nbytes for array in arrays), memory_ceiling(SIGNATURE, cfg, 16)
    assert taken < ceiling < 1.2 * taken + 2**27


def test_frames_are_what_is_not_in_the_packed_row():
    assert frames_bytes(SIGNATURE, 10) == 0
    assert frames_bytes({**SIGNATURE, "image": ArraySpec((64, 64, 3), "uint8")}, 10) == 10 * 64 * 64 * 3
