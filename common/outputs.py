"""Files that a command writes at its end: what is wrong with their paths is said at its start."""

from __future__ import annotations

from pathlib import Path

from common.types import UserError


def check_output(path: Path, suffix: str, what: str) -> None:
    """Raises UserError where no file of this suffix can be written; leaves the place as it was.

    Args:
        what: the kind of file, in the singular: "video".
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"{what}s are written as {suffix}, not {path.suffix or path.name!r}")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} for the {what}")
    existed = path.exists()
    try:
        open(path, "ab").close()
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be written ({error.strerror})") from None
    if not existed:
        path.unlink()
