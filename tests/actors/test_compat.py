"""Every repair of the package: the error that it prevents, where these packages have it, and that it does.

One process imports the package with nothing repaired and then repairs one thing after another; before and
after each it does what the repair is for.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import compat, rendering, tasks
from actors.compat import mujoco, safety_gymnasium
from actors.safety_gym import make_env
from common.types import VECTOR

_WITHOUT = """
import contextlib, json, os, sys, warnings
import gymnasium_robotics
from actors import compat, fast_reset, rendering

def attempt(act):
    with warnings.catch_warnings(), compat._warnings_of_mujoco() as notices:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)
        try:
            act()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "".join(notices)

def package(*meanwhile):
    with contextlib.ExitStack() as stack:
        for context in meanwhile:
            stack.enter_context(context())
        import safety_gymnasium
    return safety_gymnasium

def forget():
    for name in [name for name in sys.modules if name.startswith("safety_gymnasium")]:
        del sys.modules[name]

def played(task, **options):
    env = make(task, disable_env_checker=True, **options).unwrapped
    with fast_reset.light_assets():
        env.reset(seed=0)
    return env

def shown():
    env = played("SafetyPointGoal0-v0", render_mode="rgb_array", camera_name="vision")
    env.task._get_viewer("rgb_array")

compat._silence_notices()
report = {}
for context, other in (
    (compat._array_tolerant_dataclasses, compat._moved_wrappers),
    (compat._moved_wrappers, compat._array_tolerant_dataclasses),
):
    report[context.__name__] = [attempt(lambda: package(other))]
    forget()
both = compat._array_tolerant_dataclasses, compat._moved_wrappers
for row in report.values():
    row.append(attempt(lambda: package(*both)))

make = package(*both).make
acts = {
    "_keep_autoreset_in_specs": lambda: make("SafetyHopperVelocity-v1"),
    "_find_joints_by_array": lambda: [make(f"Safety{robot}Goal1-v0") for robot in ("Car", "Ant", "Doggo")],
    "_take_floats_of_arrays": lambda: [played(f"Safety{robot}Goal1-v0") for robot in ("Ant", "Doggo")],
    "_let_bounds_overflow": lambda: make("SafetyPointGoal1-v0"),
    "_size_viewers": shown,
    "_make_cheetahs_quietly": lambda: make("SafetyHalfCheetahVelocity-v1"),
}
if rendering.gl_backend() is None:
    del acts["_size_viewers"]  # no viewer without OpenGL
else:
    rendering.require_gl()
for is_missing, repair in compat._REPAIRS:
    if repair.__name__ in acts:
        act = acts[repair.__name__]
        before = attempt(act)
        if is_missing():
            repair()
        report[repair.__name__] = [before, attempt(act)]
print(json.dumps(report), flush=True)
os._exit(0)  # viewers of the package fail while the interpreter ends
"""

# What happens without each repair, in the words of whoever refuses.
ERRORS = {
    "_array_tolerant_dataclasses": "mutable default <class 'numpy.ndarray'>",
    "_moved_wrappers": "No module named 'gymnasium.wrappers.",
    "_keep_autoreset_in_specs": "no attribute 'apply_api_compatibility'",
    "_find_joints_by_array": "jnt(): incompatible function arguments",
    "_take_floats_of_arrays": "only 0-dimensional arrays can be converted",
    "_let_bounds_overflow": "overflow encountered",
    "_size_viewers": "missing 2 required positional arguments: 'width' and 'height'",
    "_make_cheetahs_quietly": "'settotalmass' is deprecated",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Repair -> what its act said without it and with it; empty where all went well."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(compat.__file__).resolve().parent.parent)},
        cwd=tmp_path_factory.mktemp("compat"),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("repair", ERRORS)
def test_a_repair_prevents_its_error(report: dict[str, list[str]], repair: str) -> None:
    if repair not in report:
        pytest.skip("no headless OpenGL here")
    before, after = report[repair]
    assert after == ""
    if before == "":
        pytest.skip("nothing is missing among these packages")
    assert ERRORS[repair] in before


def test_other_packages_stay_as_they_are() -> None:
    safety_gymnasium()
    import gymnasium.envs.mujoco.mujoco_rendering as viewers
    from gymnasium.envs.registration import EnvSpec

    assert not hasattr(dataclasses.dataclass, "__wrapped__")
    assert dataclasses.dataclass.__module__ == "dataclasses"
    assert EnvSpec.__module__ == "gymnasium.envs.registration"
    assert viewers.OffScreenViewer.__module__ == viewers.__name__
    for name in compat._MOVED:  # importable if and only if gymnasium has it
        path = f"gymnasium.wrappers.{name}"
        assert (path in sys.modules) == (importlib.util.find_spec(path) is not None)
    assert mujoco.get_mju_user_warning() is None


def test_specifications_keep_what_gymnasium_knows() -> None:
    spec = safety_gymnasium().make("SafetySwimmerVelocity-v1", disable_env_checker=True).spec
    assert (spec.id, spec.max_episode_steps, spec.reward_threshold) == (
        "SafetySwimmerVelocity-v1",
        1000,
        360.0,
    )
    assert (spec.autoreset, spec.apply_api_compatibility) == (False, False)


def test_hinge_angles_and_bounds_are_the_simulators() -> None:
    """What the repairs replace reads the same numbers: joints of Ant, bounds of Racecar."""
    from actors import fast_reset

    env = safety_gymnasium().make("SafetyAntGoal0-v0", disable_env_checker=True).unwrapped
    with fast_reset.light_assets():
        env.reset(seed=0)
    agent = env.task.agent
    assert len(agent.sensor_info.hinge_pos_names) == len(agent.sensor_info.hinge_vel_names) == 8
    seen = agent.obs_sensor()
    for name in agent.sensor_info.hinge_pos_names:
        angle = agent.get_sensor(name)[0]
        np.testing.assert_array_equal(seen[name], [np.sin(angle), np.cos(angle)])
    racecar = make_env("SafetyRacecarGoal0-v0", "lidar", 1)._sim
    expected = np.array([20, 0.785], np.float32).astype(np.float64)
    np.testing.assert_array_equal(racecar.high, expected)
    np.testing.assert_array_equal(racecar.low, -expected)


@pytest.mark.parametrize("robot", [*tasks.ROBOTS, "Velocity"])
def test_every_task_steps_in_silence(robot: str, capfd: pytest.CaptureFixture[str]) -> None:
    mine = [
        task for task in tasks.list_tasks() if task.startswith(f"Safety{robot}") and "Velocity" not in task
    ]
    if robot == "Velocity":
        mine = [task for task in tasks.list_tasks() if robot in task]
    assert len(mine) == (6 if robot == "Velocity" else 13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # the package is older than its numpy
        for task in mine:
            env = make_env(task, "lidar", 2, seed=0)
            observed = [env.reset()[VECTOR]]
            for action in np.random.default_rng(0).uniform(-1, 1, (2, env.spec.action_size)):
                observed.append(env.step(action).obs[VECTOR])
            env.close()
            assert np.isfinite(observed).all()
            assert np.shape(observed) == (3, *env.spec.obs[VECTOR].shape)
            assert (observed[0] != observed[2]).any()
    assert capfd.readouterr() == ("", "")


def test_other_warnings_of_mujoco_still_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A robot whose model warns of two things: only the known one is kept quiet."""
    safety_gymnasium()
    from safety_gymnasium.tasks.safe_velocity import safety_half_cheetah_velocity_v0 as module

    def init(self: object, **options: object) -> None:
        mujoco.get_mju_user_warning()("compiler attribute 'settotalmass' is deprecated")
        mujoco.get_mju_user_warning()("the floor is lava")

    class Cheetah:
        __init__ = init

    monkeypatch.setattr(module, "SafetyHalfCheetahVelocityEnv", Cheetah)
    compat._make_cheetahs_quietly()
    with pytest.warns(UserWarning, match="the floor is lava") as caught:
        Cheetah()
    assert len(caught) == 1


@pytest.mark.skipif(rendering.gl_backend() is None, reason="no headless OpenGL here")
def test_velocity_tasks_are_drawn_by_cgl_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """CGL is played by what renders here."""
    safety_gymnasium()
    from gymnasium.envs.mujoco import mujoco_rendering

    here = rendering.require_gl()
    cgl = ModuleType("mujoco.cgl")
    monkeypatch.setattr(cgl, "GLContext", importlib.import_module(f"mujoco.{here}").GLContext, raising=False)
    monkeypatch.setitem(sys.modules, "mujoco.cgl", cgl)
    monkeypatch.setenv("MUJOCO_GL", "cgl")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(rendering, "_loads", lambda library: library == "OpenGL")
    monkeypatch.setattr(mujoco_rendering, "_ALL_RENDERERS", dict(mujoco_rendering._ALL_RENDERERS))
    assert compat._viewers_lack_cgl()
    viewer: Any = SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"must be one of .* got 'cgl'"):
        mujoco_rendering.OffScreenViewer._get_opengl_backend(viewer, 64, 64)
    compat._add_cgl_to_viewers()
    assert not compat._viewers_lack_cgl()
    env = make_env("SafetySwimmerVelocity-v1", "lidar", 1, seed=0, render=True)
    env.reset()
    assert np.ptp(env.render()) > 50
    env.close()
