"""Reading what somebody else may have written: bounded in size, depth and in what an error repeats of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises ValueError for a larger one, OSError as `open` does."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return data


def read_json(path: Path, limit: int) -> Any:
    """A JSON document. Raises ValueError for anything else, OSError as `open` does."""
    try:
        return json.loads(read_bytes(path, limit))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shown(value: Any, limit: int = 60) -> str:
    """A value inside an error's sentence: on one line, without control characters, and short."""
    text = value[: 10 * limit] if isinstance(value, str) else _repr(value)
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """`text` without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def is_count(value: Any, most: int = 2**63 - 1) -> bool:
    """Whether a value out of a file is a whole number from 0 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_inside(directory: Path, name: str) -> bool:
    """Whether `name` is a plain relative path to something below `directory`, through no symbolic link."""
    plain = 0 < len(name) < 256 and name.isprintable()
    if not plain or os.path.isabs(name) or os.path.normpath(name) != name:
        return False
    root = os.path.realpath(directory)
    wanted = os.path.join(root, name)
    return os.path.commonpath([root, wanted]) == root and os.path.realpath(wanted) == wanted


def _repr(value: Any) -> str:
    """Containers by their kind: those of a file may be endless."""
    if isinstance(value, int | float | None):
        try:
            return repr(value)
        except ValueError:  # a whole number of thousands of digits
            return "a huge number"
    return f"a {type(value).__name__}"
