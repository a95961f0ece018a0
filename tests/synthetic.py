"""A safe task that a tiny agent learns in seconds, in place of Safety-Gymnasium.

A point on a line starts near 0; its target lies at 1 and the hazard covers everything beyond `EDGE`.
Every env step pays 1 at the target and 0 at the start, and costs the more the deeper in the hazard it
ends. Whoever ignores costs goes to the target; whoever respects them waits at the edge; whoever stands
still earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common.config import Config
from common.configuration import from_dict
from common.types import ArraySpec, EnvSpec, Step
from deploy import wiring

TASK = "SyntheticLine"
EDGE = 0.5  # where the hazard begins
LIMIT = 40  # env steps per episode
SPEED = 0.25  # of a full action, per env step

# What the tiny agent of `config` is judged by, per episode.
GOOD_RETURN = 0.5 * LIMIT  # waiting at the edge earns about 0.7 * LIMIT, standing still 0
COST_LIMIT = 3.0  # at the target: about LIMIT


def line_spec(task: str, observation: str, action_repeat: int, cameras: str = "auto") -> EnvSpec:
    """The description of the task, as `actors.safety_gym.env_spec` gives it for real ones."""
    return EnvSpec(task, {"vector": ArraySpec((2,))}, 1, action_repeat, LIMIT)


class LineEnv:
    """A `common.types.EvaluationEnv`, with the constructors of `actors.vector_env.SafetyVectorEnv`."""

    def __init__(
        self,
        task: str,
        observation: str,
        action_repeat: int,
        num_envs: int,
        seed: int,
        cameras: str = "auto",
    ):
        self._set_up(line_spec(task, observation, action_repeat), num_envs)
        self._rng = np.random.default_rng(seed)
        self._cut = np.ceil(np.arange(1, num_envs + 1) / num_envs * LIMIT).astype(int)

    @classmethod
    def for_evaluation(
        cls,
        task: str,
        observation: str,
        action_repeat: int,
        seeds: Sequence[int],
        render: bool = False,
        cameras: str = "auto",
    ) -> LineEnv:
        self = cls.__new__(cls)
        self._set_up(line_spec(task, observation, action_repeat), len(seeds))
        self._seeds = list(seeds)
        return self

    def _set_up(self, spec: EnvSpec, num_envs: int) -> None:
        self.spec, self.num_envs = spec, num_envs
        self.partial = np.zeros(num_envs, bool)
        self.finished = np.zeros(num_envs, bool)
        self.closed = False
        self._seeds: list[int] | None = None  # of evaluation episodes
        self._cut = np.full(num_envs, LIMIT)
        self._needs_reset = np.ones(num_envs, bool)
        self._position = np.zeros(num_envs)
        self._length = np.zeros(num_envs, int)

    def step(self, actions: np.ndarray) -> Step:
        if self._seeds is not None and self.finished.all():
            self.finished[:] = False
            self._needs_reset[:] = True
        first = self._needs_reset & ~self.finished
        moving = ~first & ~self.finished
        self._position[first] = self._starts()[first]
        self._length[first] = 0
        reward, cost = np.zeros((2, self.num_envs), np.float32)
        env_steps = np.zeros(self.num_envs, np.int32)
        for _ in range(self.spec.action_repeat):
            going = moving & (self._length < self._cut)
            moved = self._position + SPEED * np.clip(actions[:, 0], -1, 1)
            self._position = np.where(going, np.clip(moved, -1, 1), self._position)
            self._length += going
            x = self._position
            reward += np.where(going, 2 * x - x**2, 0.0).astype(np.float32)
            cost += np.where(going, np.maximum(0.0, x - EDGE) / (1 - EDGE), 0.0).astype(np.float32)
            env_steps += going.astype(np.int32)
        is_last = moving & (self._length >= self._cut)
        self.partial = is_last & (self._cut < LIMIT)
        self._cut[is_last] = LIMIT
        self._needs_reset = is_last
        if self._seeds is not None:
            self.finished |= is_last
        obs = np.stack([self._position, self._position - EDGE], 1).astype(np.float32)
        return Step({"vector": obs}, reward, cost, first, is_last, np.zeros(self.num_envs, bool), env_steps)

    def _starts(self) -> np.ndarray:
        if self._seeds is None:
            return self._rng.uniform(-0.2, 0.2, self.num_envs)
        return np.array([np.random.default_rng(seed).uniform(-0.2, 0.2) for seed in self._seeds])

    def render(self, index: int) -> np.ndarray:
        frame = np.zeros((64, 96, 3), np.uint8)
        frame[:, int((self._position[index] + 1) * 47)] = 255
        return frame

    def close(self) -> None:
        self.closed = True


def use_line_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part that deploy wires in this process acts in the synthetic task, whatever its name."""
    monkeypatch.setattr(wiring, "env_spec", line_spec)
    monkeypatch.setattr(wiring, "SafetyVectorEnv", LineEnv)


def config(**changes: Any) -> Config:
    """A tiny PID agent that learns the task in seconds; nested `changes` win, e.g. seed=1."""
    tiny = {
        "task": TASK,
        "backend": "inline",
        "env_steps": 12_000,
        "env": {"action_repeat": 2},
        "actors": {"envs": 16, "slice_seconds": 0.2},
        "replay": {"capacity": 20_000, "stride": 4},
        "learner": {
            "batch_size": 16,
            "batch_length": 8,
            "train_ratio": 16.0,
            "prefill": 800,
            "publish_every": 5,
        },
        "world_model": {
            "deter": 32,
            "units": 32,
            "stoch": 4,
            "classes": 8,
            "encoder_layers": 1,
            "encoder_units": 32,
            "head_layers": 1,
            "bins": 21,
            "bin_range": 3.5,
            "decoder_space": "symlog",
            "vector_loss_scale": 10.0,
            "lr": 4e-3,
        },
        "behavior": {
            "layers": 1,
            "units": 32,
            "horizon": 5,
            "imagine_starts": 64,
            "gamma": 0.9,
            "entropy": 3e-3,
            "lr": 2e-3,
        },
        "safety": {
            "cost_model": "learned",
            "constraint": "pid",
            "cost_limit": COST_LIMIT,
            "pid": {
                "kp": 0.02,
                "ki": 0.002,
                "kd": 0.0,
                "cap": 2.0,
                "init": 0.0,
                "warmup_env_steps": 3_000,
                "cost_decay": 0.9,
            },
        },
        "evaluation": {"every": 4_000, "episodes": 8, "final_episodes": 8},
        "logging": {"every_seconds": 1.0, "tensorboard": False, "live": False},
    }
    return from_dict(_merged(tiny, changes), "tests")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merged(base[key], value) if isinstance(value, dict) and key in base else value
    return merged
