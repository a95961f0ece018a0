"""Where checkpoints of the table lie, and which of them may be restored. Pure, without Reverb.

    replay/
        scratch/    where a server writes; Reverb deletes what else it finds there, so nothing is left in it
        000007/     a complete checkpoint, sealed by manifest.json together with the table's definition
        000008/

A save is moved out of `scratch` by one rename, so a killed save leaves nothing that looks complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.manifest import DamagedCheckpoint, read_manifest, sync_directory, verify, write_manifest
from common.types import UserError
from common.untrusted import shown
from replay.table import TableSpec

FORMAT = 1  # of the columns, see `replay.table.Layout`
KEEP = 2  # complete checkpoints: were the newest damaged, the one before it is used
_REVERB = "reverb"
_NAME = re.compile(r"\d{6,}")
# What Reverb restores together with the data, silently, and which setting of the user defines it.
_FIXED = {
    "format": "the version of this software",
    "signature": "the observations and actions of the task",
    "batch_length": "learner.batch_length",
    "stride": "replay.stride",
    "max_size": "replay.capacity",
    "samples_per_insert": "learner.train_ratio",
}


def made_by(directory: Path) -> str | None:
    """The `replay.server` that made the newest checkpoint in a directory, if there is one to read."""
    for path in _complete(directory):
        try:
            return str(read_manifest(path).get("server", _REVERB))
        except DamagedCheckpoint:
            continue
    return None


def _complete(directory: Path) -> list[Path]:
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


class CheckpointStore:
    """The checkpoints of one table. Creates the directory; raises UserError where it can not be written.

    `server` is the value of `replay.server` whose files they are: one cannot read those of the other.
    """

    def __init__(self, directory: Path, spec: TableSpec, server: str = _REVERB):
        self._server = server
        self.directory = Path(directory).absolute()
        self.scratch = self.directory / "scratch"
        self._definition = definition(spec)
        try:
            shutil.rmtree(self.scratch, ignore_errors=True)  # an interrupted save
            if self.scratch.is_symlink():  # Reverb would delete what lies where it leads
                self.scratch.unlink()
            self.scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The replay checkpoints can not be kept in {self.directory}: {error}."
            ) from error

    def complete(self) -> list[Path]:
        """Checkpoints, newest first; whether they are intact is not checked."""
        return _complete(self.directory)

    def newest(self, refused: Mapping[Path, str] = MappingProxyType({})) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and a sentence for every newer one that is damaged.

        Args:
            refused: what the server could not restore although it was intact, and why.

        Raises UserError when it holds a table that is defined differently from the present one.
        """
        skipped: list[str] = []
        for path in self.complete():
            try:
                content = verify(path)
                if path in refused:
                    raise DamagedCheckpoint(f"checkpoint {path} is damaged: {shown(refused[path], 200)}")
            except DamagedCheckpoint as error:
                skipped.append(f"The replay {error}; it is passed over.")
                continue
            theirs = content.get("server", _REVERB)  # older ones do not say
            if theirs != self._server:
                skipped.append(
                    f"The replay checkpoint {path} was made with replay.server {_told(theirs)}, which "
                    f"{self._server} cannot read: it is passed over, and goes with the {KEEP}nd new one."
                )
                continue
            self._compare(path, content.get("table"))
            return path, skipped
        return None, skipped

    def adopt(self, saved: Path) -> Path:
        """Seals what the server has saved, moves it to its place and deletes all but the newest `KEEP`."""
        write_manifest(saved, {"table": self._definition, "server": self._server})
        existing = self.complete()
        number = int(existing[0].name) + 1 if existing else 1
        final = saved.rename(self.directory / f"{number:06d}")
        sync_directory(self.directory)
        for old in self.complete()[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def not_saved(self, error: Exception) -> UserError:
        """The error for the user when a save failed."""
        return UserError(
            f"The replay buffer could not be saved in {self.directory}: {error}. "
            "Make room on the disk, or switch it off with --replay.no-checkpoint."
        )

    def _compare(self, path: Path, stored: Any) -> None:
        for field, setting in _FIXED.items():
            found = stored.get(field) if isinstance(stored, dict) else None
            mine = self._definition[field]
            if found != mine:
                raise UserError(
                    f"The replay checkpoint {path} was made with another {field} "
                    f"({_told(found)} instead of {_told(mine)}): keep {setting} as it was, "
                    f"or remove {self.directory} to start with an empty replay buffer."
                )


def _told(value: Any) -> str:
    return shown(json.dumps(value), 500)


def definition(spec: TableSpec) -> dict[str, Any]:
    """What of the table a checkpoint fixes, as plain JSON."""
    signature = {
        name: {"shape": list(array.shape), "dtype": array.dtype} for name, array in spec.signature.items()
    }
    fields = {field: getattr(spec, field) for field in _FIXED if field not in ("format", "signature")}
    return {"format": FORMAT, "signature": signature, **fields}
