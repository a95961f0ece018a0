"""Named deviations that show before or after the mathematics: what is stored, and who moves a controller.

The planner's are in test_planner.py and test_policy.py, next to what they deviate from.
"""

from __future__ import annotations

import jax
import numpy as np

from actors.vector_env import SafetyVectorEnv
from learner.lagrange import PidState
from tests.parity.recorded import System, assert_close, pin

TRUNCATED = (1, 3)  # the recorded batch's episode end, stored as terminal


def test_deviation_truncation_is_not_terminal(vector: System) -> None:
    """A time limit ends an episode but not the task: the continue head learns 1 there, not 0."""
    recorded = vector.recorded
    assert recorded["data/is_last"][TRUNCATED]
    assert recorded["data/is_terminal"][TRUNCATED]
    # Ours: an environment that lasts 500 steps, in agent steps of 100.
    env = SafetyVectorEnv("SafetyPointCircle0-v0", "lidar", 100, 1, seed=0, stagger=False)
    steps = [env.step(np.zeros((1, 2), np.float32)) for _ in range(6)]
    env.close()
    assert [bool(step.is_last[0]) for step in steps] == [False] * 5 + [True]
    assert not any(step.is_terminal[0] for step in steps)
    # What is stored decides what is learned.
    batch = vector.batch
    is_terminal = batch["is_terminal"].copy()
    is_terminal[TRUNCATED] = False
    loss = pin(lambda model, batch: model.loss(batch, jax.random.PRNGKey(0))[1][1]["loss/cont"])
    theirs = loss(vector.state.model, batch)
    ours = loss(vector.state.model, batch | {"is_terminal": is_terminal})
    assert_close(theirs, recorded["wm_losses/cont_loss"].mean())
    probability = recorded["head/cont/mean"][TRUNCATED]
    change = np.log1p(-probability) - np.log(probability)
    assert_close(ours - theirs, change / is_terminal.size, terms=float(theirs))


def test_deviation_evaluation_episodes_do_not_move_the_controller(pid: System) -> None:
    """The recorded sequence is that of training episodes; one evaluation episode between them changes it.

    Published runs feed the controller both. Ours hand it what actors finished (`Learner.run`), and an
    evaluation returns its episodes to the driver alone.
    """
    constraint, rows = pid.train.constraint, pid.recorded["pid/loop"]
    update = jax.jit(constraint.on_episode)

    def controlled(evaluated: bool) -> PidState:
        state = constraint.init()
        for step, cost, *_ in rows:
            state = update(state, cost, step)
            if evaluated:
                state = update(state, 100.0, step)
        return state

    assert_close(controlled(False).integral, rows[-1][5])
    assert abs(controlled(True).integral - rows[-1][5]) > 0.1
