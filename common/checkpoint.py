"""Checkpoints: atomic to save, verified to restore, no pickle anywhere.

    checkpoints/step_000000012000/
        arrays/          the leaves of the tree under their key paths, one Orbax item
        manifest.json    shapes, dtypes, size and SHA-256 of every file, and the caller's `meta`

A save fills a hidden directory, writes the manifest last and renames the directory into place, so a
killed save leaves nothing that looks complete. Restoring recomputes every checksum first: damage is
found before an array is used. The newest complete checkpoint (by step) wins.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    looks_complete,
    read_manifest,
    sync_directory,
    verify,
    write_manifest,
)
from common.types import Params, UserError
from common.untrusted import is_count, shown

FORMAT = 1
ARRAYS = "arrays"
HIDDEN = ".unfinished-"
_MOST_PER_BYTE, _OVERHEAD = 2, 100_000_000  # bytes on disk: per byte of the arrays, and beside them
_DTYPES = {"bool", "float16", "bfloat16", "float32", "float64"}
_DTYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
NAME = re.compile(r"step_(\d{12,})(?:\.(\d+))?")  # the suffix tells two saves of one step apart


@dataclass(frozen=True)
class Restored:
    step: int
    tree: Params  # the structure of `like`, leaves are numpy arrays
    meta: dict[str, Any]
    skipped: list[str] = field(default_factory=list)  # newer checkpoints passed over, and why


def save(directory: Path, step: int, tree: Params, meta: Mapping[str, Any], keep: int = 3) -> Path:
    """Writes a checkpoint, deletes all but the newest `keep` complete ones, and returns its path.

    `tree` is any jax pytree of arrays and numbers, `meta` anything JSON can hold. Raises UserError
    when it cannot be written (disk full, no permission); older checkpoints are untouched then.
    """
    directory = Path(directory).absolute()
    arrays = {path: _to_numpy(path, leaf) for path, leaf in _flatten(tree).items()}
    content = {
        "format": FORMAT,
        "step": int(step),
        "meta": dict(meta),
        "arrays": {path: _describe(array) for path, array in arrays.items()},
    }
    content = json.loads(json.dumps(content))  # refuses what JSON cannot hold before anything is written
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        final = directory / _free_name(directory, int(step))
        work = directory / f"{HIDDEN}{final.name}"
        _write(work, arrays, content)
        os.replace(work, final)
        sync_directory(directory)
    except Exception as error:  # Orbax reports a full disk as an error of its own, not as OSError
        for leftover in directory.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {directory}: {error}. "
            "Older checkpoints are untouched; make room on the disk or choose another run directory."
        ) from error
    _prune(directory, max(1, keep))
    return final


def restore_latest(directory: Path, like: Params) -> Restored | None:
    """Restores the newest undamaged checkpoint, or None where none was ever completed.

    Damaged ones are passed over and named in `skipped`. Raises UserError when every checkpoint is
    damaged, or when the newest undamaged one does not hold exactly the arrays of `like`.
    """
    directory = Path(directory)
    skipped = []
    for path in _candidates(directory):
        try:
            return Restored(**{**vars(restore(path, like)), "skipped": skipped})
        except DamagedCheckpoint as error:
            skipped.append(str(error))
    if skipped:
        raise UserError(f"no usable checkpoint in {directory}: {'; '.join(skipped)}")
    return None


def restore(path: Path, like: Params) -> Restored:
    """Restores one checkpoint into the structure of `like` (arrays or shape structs).

    Raises DamagedCheckpoint when a file is missing or changed, and UserError when an array is
    missing, left over, or of another shape or dtype.
    """
    import jax

    path = Path(path).absolute()
    content = _read(path)
    verify(path)
    expected = _flatten(like)
    _check_fit(path, content["arrays"], {name: _describe(leaf) for name, leaf in expected.items()})
    loaded = _read_arrays(path, content["arrays"])
    leaves = [_from_numpy(loaded[name], leaf) for name, leaf in expected.items()]
    tree = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves)
    return Restored(content["step"], tree, content["meta"])


def check_fit(path: Path, like: Params) -> None:
    """Raises UserError when a checkpoint does not hold exactly the arrays of `like`; reads none of them."""
    expected = {name: _describe(leaf) for name, leaf in _flatten(like).items()}
    _check_fit(path, _read(Path(path))["arrays"], expected)


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of one checkpoint, without reading its arrays."""
    return _read(Path(path))["meta"]


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint (all files there and of the right size), or None."""
    return next(
        (path for path in _candidates(Path(directory)) if looks_complete(path) and _is_ours(path)), None
    )


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint meant by a run directory, its checkpoints/ or one checkpoint (newest complete)."""
    path = Path(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no run or checkpoint at {path}{hint}")
    if NAME.fullmatch(path.name):
        _read(path)
        return path
    for directory in (path / "checkpoints", path):
        found = latest(directory)
        if found is not None:
            return found
    raise UserError(
        f"{path} holds no complete checkpoint; give a run directory, its checkpoints/ or one "
        "checkpoints/step_... in it"
    )


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, of the form that `save` gives it.

    Raises DamagedCheckpoint for anything else, and UserError for another format.
    """
    content = read_manifest(path)
    if content.get("format") != FORMAT:
        found = shown(content.get("format"))
        raise UserError(f"checkpoint {path} has format {found}, this version reads format {FORMAT}")
    arrays: Any = content.get("arrays")
    whole = isinstance(arrays, dict) and all(map(_is_description, arrays.values()))
    if not whole or not isinstance(content.get("meta"), dict) or not is_count(content.get("step")):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its {MANIFEST} describes no checkpoint")
    needed = sum(_bytes(entry) for entry in arrays.values())
    if sum(size for size, _ in content["files"].values()) > _MOST_PER_BYTE * needed + _OVERHEAD:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its files are far larger than its arrays")
    return content


def _is_ours(path: Path) -> bool:
    try:
        return bool(_read(path))
    except DamagedCheckpoint:
        return False


def _is_description(entry: Any) -> bool:
    """Whether an entry of a manifest describes an array, as `_describe` does."""
    if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype"}:
        return False
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return False
    return isinstance(shape, list) and len(shape) <= 32 and all(is_count(size, 2**40) for size in shape)


def _bytes(described: Mapping[str, Any]) -> int:
    return math.prod(described["shape"]) * np.dtype(described["dtype"]).itemsize


def _flatten(tree: Params) -> dict[str, Any]:
    """Leaves under their key paths, such as `params/actor/layers/0/weight`."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same key path: a dict key contains '/'")
    return flat


def _is_key(leaf: Any) -> bool:
    import jax

    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(path: str, leaf: Any) -> np.ndarray:
    """A leaf on the host; typed random keys become their uint32 data."""
    import jax

    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    if array.dtype.hasobject or array.dtype.kind in "USmM":
        raise TypeError(f"leaf {path} of the tree is no numeric array: {type(leaf).__name__}")
    return array


def _from_numpy(array: np.ndarray, like: Any) -> Any:
    import jax

    if _is_key(like):
        # A shape struct does not tell the implementation of its key: then it is the default one.
        impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else None
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=impl)
    return array


def _describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of an array, a number or a shape struct, as the manifest holds them."""
    import jax

    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}


def _write(work: Path, arrays: Mapping[str, np.ndarray], content: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    work.mkdir()
    filled = {path: array for path, array in arrays.items() if array.size}  # Orbax refuses empty arrays
    if filled:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(work / ARRAYS, args=ocp.args.PyTreeSave(filled))
    write_manifest(work, content)


def _read_arrays(path: Path, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    arrays = {
        name: np.zeros(entry["shape"], np.dtype(entry["dtype"]))
        for name, entry in described.items()
        if 0 in entry["shape"]
    }
    if len(arrays) < len(described):
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                item = checkpointer.metadata(path / ARRAYS).item_metadata
                _check_stored({} if item is None else item.tree, described)
                stored = checkpointer.restore(path / ARRAYS, args=ocp.args.PyTreeRestore())
        except Exception as error:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {shown(str(error), 300)}") from error
        arrays.update({name: np.asarray(array) for name, array in stored.items()})
    if {name: _describe(array) for name, array in arrays.items()} != described:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its arrays are not those of its manifest")
    return arrays


def _check_stored(stored: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Raises ValueError when reading would take more room than the arrays that the manifest describes."""
    for name, array in stored.items():
        shape = described.get(name, {}).get("shape")
        chunk = array.storage.chunk_shape if array.storage is not None else array.shape
        if list(array.shape) != shape or any(c > max(1, size) for c, size in zip(chunk, shape, strict=True)):
            raise ValueError(f"{shown(name)} is stored with another shape than its manifest says")


def _check_fit(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in expected]
    for name in expected:
        if name in stored and stored[name] != expected[name]:
            have, want = (f"{d['dtype']}{d['shape']}" for d in (stored[name], expected[name]))
            problems.append(f"{name} is {have}, expected {want}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"checkpoint {path} was made by another configuration: {'; '.join(problems[:4])}{more}. "
            "Use the configuration saved beside it (config.yaml of its run)."
        )


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _candidates(directory: Path) -> Iterator[Path]:
    """Checkpoints of a directory, complete or not, newest first."""
    found = directory.glob("step_*") if directory.is_dir() else ()
    return iter(sorted((path for path in found if NAME.fullmatch(path.name)), key=_order, reverse=True))


def _free_name(directory: Path, step: int) -> str:
    """A name no checkpoint has: the older save of the same step stays until this one is complete."""
    taken = [_order(path)[1] for path in _candidates(directory) if _order(path)[0] == step]
    return f"step_{step:012d}" + (f".{max(taken) + 1}" if taken else "")


def _prune(directory: Path, keep: int) -> None:
    complete = 0
    for path in _candidates(directory):
        if complete >= keep:
            hidden = directory / f"{HIDDEN}{path.name}"  # so that a half-deleted one is never listed
            try:
                os.replace(path, hidden)
            except OSError:
                continue  # an old checkpoint too many does no harm
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            complete += looks_complete(path)
