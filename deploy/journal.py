"""Rows on their way to the metrics writer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from common.types import UserError
from deploy.supervision import METRICS, Proxy, Supervisor


class Journal:
    """Sends rows to the part `metrics`; what that has not confirmed goes to its successor.

    Args:
        start: makes the writer; takes the env steps up to which its files hold good rows, None for a
            new run.
    """

    def __init__(self, parts: Supervisor, start: Callable[[int | None], Proxy], resume_env_steps: int | None):
        self._parts, self._begins_at = parts, resume_env_steps
        self._unconfirmed: deque[tuple[str, int, Any]] = deque()
        self.confirmed = False  # a first row
        parts.launch(METRICS, lambda: start(self._begins_at), self._send_again)

    def record(self, method: str, env_steps: int, value: Any) -> None:
        """Calls `method` of the `common.metrics.MetricsWriter`."""
        self._unconfirmed.append((method, env_steps, value))
        self._send(method, env_steps, value)

    def _send(self, method: str, env_steps: int, value: Any) -> None:
        self._parts.call(METRICS, method, env_steps, value, then=self._confirm, otherwise=self._refused)

    def _send_again(self) -> None:
        for row in self._unconfirmed:
            self._send(*row)

    def _confirm(self, _: Any) -> None:
        _, env_steps, _ = self._unconfirmed.popleft()
        self._begins_at = max(self._begins_at or 0, env_steps)
        self.confirmed = True
        self._parts.progressed(METRICS)

    def _refused(self, error: UserError) -> None:
        """A disk may be full for a while; what is wrong from the start stays wrong."""
        if not self.confirmed:
            raise error
        self._parts.fail(METRICS, error)
