"""What a run has done, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What a run has done since it began, over all of its resumes."""

    env_steps: int = 0
    agent_steps: int = 0
    replayed_steps: int = 0
    updates: int = 0
    wall_seconds: float = 0.0
    restarts: int = 0  # of parts that failed
    evaluated_at: int = -1  # env steps of the newest evaluation
    lost_updates: int = 0  # that a restarted learner did not remember
    lost_steps: int = 0  # agent steps, at most, that a restarted replay server did not remember

    def train_ratio(self, prefill: int) -> float:
        """Realised replayed agent steps per agent step collected after the prefill."""
        return self.replayed_steps / max(1, self.agent_steps - prefill)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    counters: Counters
    signal: int | None  # that ended it early
    summary: dict[str, float] | None  # of the final evaluation


def exit_code(outcome: Outcome) -> int:
    """0 for a completed run, 128 + signal for an interrupted one."""
    return 0 if outcome.signal is None else 128 + outcome.signal
