"""A directory that can prove it is complete and unchanged.

`manifest.json`, written last, holds the size and SHA-256 of every other file, whatever else the
writer wants to say about them, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.types import UserError
from common.untrusted import is_count, is_inside, read_json, shown

MANIFEST = "manifest.json"
_MAX_BYTES = 20_000_000  # the largest has about 100,000


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or whose files changed after they were written."""


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Seals the files of a directory, which are flushed to disk. `content` must survive JSON unchanged."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    content = {**content, "files": {str(path.relative_to(directory)): _fingerprint(path) for path in files}}
    text = json.dumps({"checksum": _checksum(content), "content": content}, indent=1)
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> dict[str, Any]:
    """What `write_manifest` sealed. Raises DamagedCheckpoint when it is missing or was changed, or when it
    names a file that is not inside the directory."""
    file = path / MANIFEST
    if not file.is_file():
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: it has no {MANIFEST}")
    try:
        document = read_json(file, _MAX_BYTES)
        content = document["content"]
        intact = document["checksum"] == _checksum(content)
        files = content["files"]
        described = all(is_count(size) and isinstance(checksum, str) for size, checksum in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        reason = shown(str(error), 200)
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {MANIFEST} is unreadable ({reason})"
        ) from error
    if not intact or not described:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {MANIFEST} was changed")
    for name in files:
        if not is_inside(path, name):
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {shown(name)} is no file inside it")
    return content


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file was read and found as it was written; else DamagedCheckpoint."""
    content = read_manifest(path)
    _check_sizes(path, content["files"])
    for name, written in content["files"].items():
        try:
            intact = _fingerprint(path / name) == written
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name}: {error.strerror}") from error
        if not intact:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} was changed")
    return content


def looks_complete(path: Path) -> bool:
    """Whether every file is there with the right size; cheap, so that it does not find flipped bits."""
    try:
        _check_sizes(path, read_manifest(path)["files"])
    except DamagedCheckpoint:
        return False
    return True


def sync_directory(directory: Path) -> None:
    """Makes a rename in the directory survive a power cut."""
    _sync(directory)


def _check_sizes(path: Path, files: Mapping[str, Any]) -> None:
    for name, (size, _) in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} {what}")


def _fingerprint(path: Path) -> list[Any]:
    """[size in bytes, SHA-256] of a file."""
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
