"""A table in memory with its checkpoints."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from common.config import ReplayConfig
from common.manifest import DamagedCheckpoint
from common.types import ArraySpec
from replay.memory import files
from replay.memory.table import MemoryTable
from replay.storage import CheckpointStore
from replay.table import ReplayInfo, table_spec


class MemoryServer:
    """The replay of `replay.server.ReplayServer` in the memory of this process: same table, no port.

    With a `checkpoint_dir` the newest intact checkpoint is restored first; `restored` names it and
    `messages` holds sentences about others that are damaged, or made by Reverb. `streams` is the number of
    environments that write. Writers and samplers reach `table` by a `replay.memory.link.Link`.

    Raises UserError when the checkpoint belongs to another table definition (naming the field).
    """

    def __init__(
        self,
        signature: Mapping[str, ArraySpec],
        cfg: ReplayConfig,
        *,
        batch_length: int,
        train_ratio: float,
        batch_size: int,
        min_steps: int,
        streams: int = 1,
        checkpoint_dir: Path | None = None,
    ):
        self.spec = table_spec(
            signature,
            cfg,
            batch_length=batch_length,
            train_ratio=train_ratio,
            batch_size=batch_size,
            min_steps=min_steps,
            streams=streams,
        )
        self.messages: list[str] = []
        self.restored: Path | None = None
        self._streams, self._compressed = streams, cfg.compression == "lz4"
        self._saving = threading.Lock()
        self._store = (
            CheckpointStore(checkpoint_dir, self.spec, "memory") if checkpoint_dir is not None else None
        )
        self.table = self._restored()

    def checkpoint(self) -> Path:
        """Saves the table, while others go on using it, and returns the directory.

        Older checkpoints survive a failure (UserError).
        """
        if self._store is None:
            raise RuntimeError("This replay was started without a checkpoint directory.")
        with self._saving:
            half = self._store.scratch / str(time.time_ns())
            try:
                half.mkdir()
                files.save(self.table, half)
                return self._store.adopt(half)
            except OSError as error:
                with contextlib.suppress(OSError):
                    shutil.rmtree(half)  # it takes room that others need
                raise self._store.not_saved(error) from error

    def info(self) -> ReplayInfo:
        """What is in the table now, and what went through it."""
        return self.table.info()

    def stop(self) -> None:
        """Ends the service; writers and samplers that wait are let go."""
        self.table.close()

    def _restored(self) -> MemoryTable:
        """A table with the newest checkpoint that can be read."""
        refused: dict[Path, str] = {}
        while True:
            table = MemoryTable(self.spec, self._streams, self._compressed)
            if self._store is None:
                return table
            self.restored, self.messages = self._store.newest(refused)
            if self.restored is None:
                return table
            try:
                lost = files.load(table, self.restored)
            except DamagedCheckpoint as error:
                refused[self.restored] = str(error).partition(" is damaged: ")[2]
                continue
            if lost:
                self.messages.append(f"Of the replay checkpoint, {lost} windows find no room any more.")
            return table
