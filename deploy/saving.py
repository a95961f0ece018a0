"""Checkpoints of learner and replay while training goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from common.types import UserError
from deploy.supervision import LEARNER, Supervisor, first_words

# Longest silence of a part that saves; a large replay buffer takes minutes.
SAVE_SECONDS = 600.0
SAVE_REPLAY_SECONDS = 3600.0


class Saver:
    """Saves the learner, then the replay servers, one at a time. A save that fails is left out.

    Args:
        every_seconds: between the beginnings of two saves.
        replays: names of the replay servers that are saved.
        meta: what a checkpoint of the learner tells besides its state.
        failed: hears why there is no checkpoint.
    """

    def __init__(
        self,
        parts: Supervisor,
        every_seconds: float,
        replays: Sequence[str],
        meta: Callable[[], dict[str, Any]],
        failed: Callable[[str], None],
    ):
        self._parts, self._every, self._replays = parts, every_seconds, replays
        self._meta, self._failed = meta, failed
        self._began = time.monotonic()
        self._saving = False
        self._written: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()

    def wrote(self, replay: str, agent_steps: int) -> None:
        """So many more agent steps went to that replay server."""
        self._written[replay] += agent_steps

    def lose(self, replay: str) -> int:
        """Agent steps, at most, that a replay server has forgotten which goes on from its checkpoint."""
        lost = self._written[replay] - self._saved[replay]
        self._saved[replay] = self._written[replay]  # they are not lost once more
        return lost

    def save_if_due(self) -> None:
        """Begins a save without waiting for it. A part that is down shall not replace what it restores."""
        now = time.monotonic()
        if self._saving or now - self._began < self._every or LEARNER in self._parts.down():
            return
        self._saving, self._began = True, now
        self._call(LEARNER, SAVE_SECONDS, "save", self._meta(), then=lambda _: self._save(self._replays))

    def interrupted(self) -> None:
        """A part that may have been saving has died."""
        self._saving = False

    def _save(self, replays: Sequence[str]) -> None:
        up = [name for name in replays if name not in self._parts.down()]
        self._saving = bool(up)
        if self._saving:
            name, steps = up[0], self._written[up[0]]

            def saved(_: Any) -> None:
                self._saved[name] = steps
                self._save(up[1:])

            self._call(name, SAVE_REPLAY_SECONDS, "checkpoint", then=saved)

    def _call(self, name: str, patience: float, method: str, *args: Any, then: Callable[[Any], None]) -> None:
        self._parts.call(name, method, *args, then=then, otherwise=self._refused, patience=patience)

    def _refused(self, error: UserError) -> None:
        self._saving = False
        self._failed(first_words(error))
