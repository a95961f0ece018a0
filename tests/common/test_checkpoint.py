import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import checkpoint
from common.manifest import MANIFEST, DamagedCheckpoint, looks_complete, verify
from common.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


class Pid(NamedTuple):
    integral: jax.Array
    previous: jax.Array | None


def small(value: float = 0.0) -> dict:
    return {"weight": np.full((4, 3), value, np.float32), "count": np.int32(value)}


def saved_steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def arrays_file(path: Path) -> Path:
    """The largest file: where the arrays themselves are."""
    return max(
        (p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST), key=lambda p: p.stat().st_size
    )


def test_every_kind_of_leaf_comes_back_exactly(tmp_path):
    mlp = eqx.filter(eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0)), eqx.is_array)
    tree = {
        "params": mlp,
        "opt_state": optax.adam(1e-3).init(mlp),
        "pid": Pid(jnp.float32(0.25), None),
        "key": jax.random.key(7),
        "raw_key": jax.random.PRNGKey(8),
        "bfloat": jnp.array([1.5, -2.0], jnp.bfloat16),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "number": 5,
        "odd .name[0]": [np.arange(3, dtype=np.int8)],
    }
    checkpoint.save(tmp_path, 40, tree, {"env_steps": 400, "cap": float("inf")})
    restored = checkpoint.restore_latest(tmp_path, tree)
    assert restored is not None
    assert (restored.step, restored.meta, restored.skipped) == (
        40,
        {"env_steps": 400, "cap": float("inf")},
        [],
    )
    assert jax.tree.structure(restored.tree) == jax.tree.structure(tree)
    for found, expected in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(tree), strict=True):
        if jnp.issubdtype(jnp.asarray(expected).dtype, jax.dtypes.prng_key):
            found, expected = jax.random.key_data(found), jax.random.key_data(expected)
        else:
            assert isinstance(found, np.ndarray)
        assert found.dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(found, expected)


def test_shape_structs_are_enough_to_restore(tmp_path):
    tree = {"key": jax.random.key(3), "weight": jnp.ones((2, 2))}
    path = checkpoint.save(tmp_path, 1, tree, {})
    restored = checkpoint.restore(path, jax.eval_shape(lambda: tree))
    assert jnp.array_equal(jax.random.key_data(restored.tree["key"]), jax.random.key_data(tree["key"]))


def test_the_newest_is_restored_and_only_the_last_are_kept(tmp_path):
    assert checkpoint.restore_latest(tmp_path / "nothing", small()) is None
    for step in (5, 20, 100, 1_000_000_000_000):
        checkpoint.save(tmp_path, step, small(step % 97), {"step": step}, keep=3)
    names = ["step_000000000020", "step_000000000100", "step_1000000000000"]
    assert saved_steps(tmp_path) == names
    restored = checkpoint.restore_latest(tmp_path, small())
    assert restored is not None
    assert restored.step == 1_000_000_000_000
    assert restored.tree["count"] == 1_000_000_000_000 % 97


def test_saving_a_step_again_wins_over_the_older_save(tmp_path):
    for value in (1, 2, 3):
        checkpoint.save(tmp_path, 7, small(value), {}, keep=2)
    restored = checkpoint.restore_latest(tmp_path, small())
    assert restored is not None
    assert restored.tree["count"] == 3
    assert len(saved_steps(tmp_path)) == 2


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, harm):
    checkpoint.save(tmp_path, 1, small(1), {})
    newest = checkpoint.save(tmp_path, 2, small(2), {})
    damaged = arrays_file(newest)
    harm(damaged)
    restored = checkpoint.restore_latest(tmp_path, small())
    assert restored is not None
    assert restored.tree["count"] == 1
    assert len(restored.skipped) == 1
    assert newest.name in restored.skipped[0]
    assert damaged.name in restored.skipped[0]
    with pytest.raises(DamagedCheckpoint, match="damaged"):
        checkpoint.restore(newest, small())


def test_a_flipped_bit_is_found_in_every_file(tmp_path):
    path = checkpoint.save(tmp_path, 1, small(1), {"note": "abc"})
    files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]
    assert MANIFEST in {file.name for file in files}
    for file in files:
        data = file.read_bytes()
        flip_a_bit(file)
        with pytest.raises(DamagedCheckpoint):
            verify(path)
        file.write_bytes(data)
    verify(path)


def test_a_truncated_file_is_named_with_its_sizes(tmp_path):
    path = checkpoint.save(tmp_path, 1, small(), {})
    file = arrays_file(path)
    size = file.stat().st_size
    truncate(file)
    with pytest.raises(DamagedCheckpoint, match=f"{file.name} has {size // 2} bytes instead of {size}"):
        checkpoint.restore(path, small())


def test_a_changed_manifest_is_found_although_it_is_valid_json(tmp_path):
    path = checkpoint.save(tmp_path, 1, small(), {"env_steps": 1234})
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text().replace("1234", "1235"))
    with pytest.raises(DamagedCheckpoint, match="was changed"):
        checkpoint.read_meta(path)


def test_nothing_but_damage_is_an_error_not_a_fresh_start(tmp_path):
    truncate(checkpoint.save(tmp_path, 1, small(), {}) / MANIFEST)
    with pytest.raises(UserError, match=r"no usable checkpoint.*step_000000000001"):
        checkpoint.restore_latest(tmp_path, small())


def test_a_damaged_one_does_not_push_out_a_complete_one(tmp_path):
    truncate(arrays_file(checkpoint.save(tmp_path, 50, small(), {})))
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, small(step), {}, keep=2)
    restored = checkpoint.restore_latest(tmp_path, small())
    assert restored is not None
    assert restored.tree["count"] == 3
    assert saved_steps(tmp_path) == ["step_000000000002", "step_000000000003", "step_000000000050"]


def test_another_configuration_is_refused_by_name(tmp_path):
    checkpoint.save(tmp_path, 1, small(), {})
    missing = {**small(), "bias": np.zeros(3, np.float32)}
    left_over = {"count": np.int32(0)}
    shape = {**small(), "weight": np.zeros((4, 2), np.float32)}
    dtype = {**small(), "weight": np.zeros((4, 3), np.float64)}
    for like, message in (
        (missing, "bias is missing"),
        (left_over, "weight is not expected"),
        (shape, r"weight is float32\[4, 3\], expected float32\[4, 2\]"),
        (dtype, r"weight is float32\[4, 3\], expected float64\[4, 3\]"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            checkpoint.restore_latest(tmp_path, like)
        assert not isinstance(caught.value, DamagedCheckpoint)
    many = {f"layer{i}": np.zeros(1) for i in range(9)}
    with pytest.raises(UserError, match="and 7 more"):
        checkpoint.restore_latest(tmp_path, many)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, small(), {})
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(UserError, match="format 1"):
        checkpoint.restore_latest(tmp_path, small())


def test_what_is_no_array_or_no_json_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match="leaf name"):
        checkpoint.save(tmp_path, 1, {"name": "text"}, {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, small(), {"path": Path("x")})
    with pytest.raises(ValueError, match="same key path"):
        checkpoint.save(tmp_path, 1, {"a/b": np.ones(1), "a": {"b": np.ones(1)}}, {})
    assert list(tmp_path.iterdir()) == []


def test_meta_is_read_without_the_arrays(tmp_path):
    path = checkpoint.save(tmp_path, 3, small(), {"task": "SafetyPointGoal1-v0"})
    shutil.rmtree(path / checkpoint.ARRAYS)
    assert checkpoint.read_meta(path) == {"task": "SafetyPointGoal1-v0"}


def test_find_checkpoint_takes_a_run_its_directory_or_one_checkpoint(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    older, newest = (checkpoint.save(directory, step, small(), {}) for step in (1, 2))
    assert checkpoint.find_checkpoint(tmp_path / "run") == newest
    assert checkpoint.find_checkpoint(str(directory)) == newest
    assert checkpoint.find_checkpoint(older) == older
    truncate(arrays_file(newest))
    assert checkpoint.find_checkpoint(tmp_path / "run") == older
    with pytest.raises(UserError, match=r"did you mean .*run\?"):
        checkpoint.find_checkpoint(tmp_path / "rum")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find_checkpoint(tmp_path)
    (newest / MANIFEST).unlink()
    with pytest.raises(UserError, match="incomplete"):
        checkpoint.find_checkpoint(newest)


def test_a_failed_write_keeps_the_older_checkpoints(tmp_path):
    """A real failure: the system refuses to let a file grow beyond 64 KiB, as a full disk would."""
    checkpoint.save(tmp_path, 1, small(1), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
    try:
        with pytest.raises(UserError, match="step 2 could not be written"):
            checkpoint.save(tmp_path, 2, {"noise": np.random.default_rng(0).random(500_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved_steps(tmp_path) == ["step_000000000001"]
    restored = checkpoint.restore_latest(tmp_path, small())
    assert restored is not None
    assert restored.tree["count"] == 1


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="could not be written"):
        checkpoint.save(tmp_path / "checkpoints", 1, small(), {})


SAVE_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from common import checkpoint
for step in range(1, 400):
    tree = {"noise": np.random.default_rng(step).random(1_000_000), "step": np.int64(step)}
    checkpoint.save(Path(sys.argv[1]), step, tree, {})
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    """kill -9 while a save is going on: what is found afterwards is the last complete checkpoint."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        unfinished = list(tmp_path.glob(f"{checkpoint.HIDDEN}step_*"))
        if unfinished and len(list(tmp_path.glob("step_*"))) >= 2:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    newest = max(int(path.name.removeprefix("step_")) for path in tmp_path.glob("step_*"))
    like = {"noise": np.zeros(1_000_000), "step": np.int64(0)}
    restored = checkpoint.restore_latest(tmp_path, like)
    assert restored is not None
    assert (restored.step, int(restored.tree["step"]), restored.skipped) == (newest, newest, [])
    np.testing.assert_array_equal(restored.tree["noise"], np.random.default_rng(newest).random(1_000_000))
    checkpoint.save(tmp_path, newest + 1, like, {})
    assert not list(tmp_path.glob(f"{checkpoint.HIDDEN}*"))


def test_every_interrupted_state_of_a_save_is_unfinished(tmp_path):
    """Whatever prefix of its files a save has written, the result does not look complete."""
    path = checkpoint.save(tmp_path / "whole", 1, small(1), {})
    order = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MANIFEST]
    for written in range(len(order)):
        partial = tmp_path / f"part{written}" / path.name
        for file in order[:written]:
            target = partial / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        assert not looks_complete(partial)
        if written:  # even if its manifest had come first
            shutil.copy(path / MANIFEST, partial)
            assert not looks_complete(partial)
    assert looks_complete(path)


def test_nothing_is_pickled(tmp_path):
    path = checkpoint.save(tmp_path, 1, small(), {"a": 1})
    json.loads((path / MANIFEST).read_text())
    assert not [file for file in path.rglob("*") if file.suffix in (".pkl", ".pickle", ".npy", ".npz")]
    assert all(b"\x80\x04\x95" not in file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_importing_checkpoint_is_light():
    code = "import sys, common.checkpoint; print([m for m in ('jax', 'orbax') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
