"""Checkpoints of learner and replay while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common.types import UserError
from deploy.supervision import LEARNER, REPLAY, Supervisor, first_words

# Longest silence of a part that saves; a large replay buffer takes minutes.
SAVE_SECONDS = 600.0
SAVE_REPLAY_SECONDS = 3600.0


class Saver:
    """Saves the learner, then replay, one at a time. A save that fails is left out.

    Args:
        every_seconds: between the beginnings of two saves.
        meta: what a checkpoint of the learner tells besides its state.
        failed: hears why there is no checkpoint.
    """

    def __init__(
        self,
        parts: Supervisor,
        every_seconds: float,
        replay: bool,
        meta: Callable[[], dict[str, Any]],
        failed: Callable[[str], None],
    ):
        self._parts, self._every, self._replay = parts, every_seconds, replay
        self._meta, self._failed = meta, failed
        self._began = time.monotonic()
        self._saving = False
        self.agent_steps = 0  # that the newest checkpoint of replay knows of

    def save_if_due(self) -> None:
        """Begins a save without waiting for it. A part that is down shall not replace what it restores."""
        now = time.monotonic()
        if self._saving or now - self._began < self._every or LEARNER in self._parts.down():
            return
        self._saving, self._began = True, now
        meta = self._meta()
        steps = meta["counters"]["agent_steps"]
        self._call(LEARNER, SAVE_SECONDS, "save", meta, then=lambda _: self._save_replay(steps))

    def interrupted(self) -> None:
        """A part that may have been saving has died."""
        self._saving = False

    def _save_replay(self, agent_steps: int) -> None:
        self._saving = self._replay and REPLAY not in self._parts.down()
        if self._saving:
            then = lambda _: self._saved(agent_steps)  # noqa: E731
            self._call(REPLAY, SAVE_REPLAY_SECONDS, "checkpoint", then=then)

    def _saved(self, agent_steps: int) -> None:
        self._saving, self.agent_steps = False, agent_steps

    def _call(self, name: str, patience: float, method: str, *args: Any, then: Callable[[Any], None]) -> None:
        self._parts.call(name, method, *args, then=then, otherwise=self._refused, patience=patience)

    def _refused(self, error: UserError) -> None:
        self._saving = False
        self._failed(first_words(error))
