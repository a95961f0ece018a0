import importlib
import os
import sys
from types import ModuleType

import numpy as np
import pytest

from actors import render_thread, rendering
from actors.safety_gym import make_env
from actors.vector_env import SafetyVectorEnv
from common.types import UserError

needs_gl = pytest.mark.skipif(rendering.gl_backend() is None, reason="no headless OpenGL here")


def test_without_gl_the_error_names_the_packages(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    assert rendering.gl_backend() is None
    with pytest.raises(UserError, match=r"libegl1 libgles2 .*libosmesa6"):
        make_env("SafetyPointGoal1-v0", "lidar", 1, render=True)


def test_osmesa_is_second_choice(monkeypatch):
    monkeypatch.setattr(rendering, "_loads", lambda library: library == "OSMesa")
    assert rendering.gl_backend() == "osmesa"


def test_a_backend_that_is_wished_for_must_be_there(monkeypatch):
    monkeypatch.setattr(rendering, "_loads", lambda library: library == "OSMesa")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(UserError, match=r"egl \(MUJOCO_GL\) is not installed.*libegl1"):
        rendering.require_gl()
    monkeypatch.setenv("MUJOCO_GL", " OSMesa")
    assert rendering.require_gl() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(UserError, match="egl or osmesa"):
        rendering.require_gl()


def test_macos_renders_with_its_own_opengl(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(rendering, "_loads", lambda library: library == "OpenGL")
    monkeypatch.setenv("MUJOCO_GL", "")
    assert rendering.gl_backend() == rendering.require_gl() == "cgl"
    assert os.environ["MUJOCO_GL"] == "cgl"  # which is what MuJoCo and gymnasium read
    assert rendering.missing_packages() == []
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(UserError, match="'egl': rendering without a screen needs cgl"):
        rendering.require_gl()
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(
        UserError, match=r"macOS brings \(CGL\) does not load\. Train without cameras"
    ) as error:
        rendering.require_gl()
    assert "apt-get" not in str(error.value)


def test_other_systems_need_a_screen(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setenv("MUJOCO_GL", "")
    assert rendering.gl_backend() is None
    with pytest.raises(UserError, match=r"not on Windows\. Train without cameras.*MUJOCO_GL=glfw"):
        rendering.require_gl()
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert rendering.require_gl() == "glfw"


@needs_gl
def test_cameras_and_the_outside_view_are_drawn_by_cgl_on_macos(monkeypatch):
    """CGL is played by what renders here: the same pictures, by the backend's name alone."""
    here = rendering.require_gl()
    expected = make_env("SafetyPointGoal0-v0", "vision", 1, seed=0).reset()["image"]
    cgl = ModuleType("mujoco.cgl")
    monkeypatch.setattr(cgl, "GLContext", importlib.import_module(f"mujoco.{here}").GLContext, raising=False)
    monkeypatch.setitem(sys.modules, "mujoco.cgl", cgl)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(rendering, "_loads", lambda library: library == "OpenGL")
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(render_thread, "_shared", None)
    env = make_env("SafetyPointGoal0-v0", "vision", 1, seed=0, render=True)
    np.testing.assert_array_equal(env.reset()["image"], expected)
    assert os.environ["MUJOCO_GL"] == "cgl"
    assert np.ptp(env.render()) > 50
    render_thread.shared().close()


@needs_gl
def test_frames_show_the_true_sky_in_every_episode(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", rendering.gl_backend() or "")
    env = SafetyVectorEnv.for_evaluation("SafetyPointGoal1-v0", "coordinates", 5, [0], render=True)
    plain = SafetyVectorEnv.for_evaluation("SafetyPointGoal1-v0", "coordinates", 5, [0])
    actions = np.array([[1.0, 0.3]], np.float32)
    steps, frames = [], []
    for _ in range(3):
        steps.append((env.step(actions), plain.step(actions)))
        frames.append(env.render(0))
    for shown, unseen in steps:  # looking changes nothing
        np.testing.assert_array_equal(shown.obs["vector"], unseen.obs["vector"])
        np.testing.assert_array_equal(shown.reward, unseen.reward)
    assert frames[0].shape == (240, 320, 3)
    assert frames[0].dtype == np.uint8
    assert (frames[0] != frames[2]).any()
    env._envs[0].reset(1)
    frames.append(env.render(0))
    # Stars (up to 52), not the flat black sky of a fast reset (up to 3); the camera stands still.
    assert frames[0][:30].max() > 20
    np.testing.assert_allclose(frames[3][:30].astype(int), frames[0][:30], atol=2)
    env.close()


@needs_gl
@pytest.mark.parametrize("task", ["SafetyHopperVelocity-v1", "SafetyHumanoidVelocity-v1"])
def test_velocity_frames_follow_the_robot(task, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", rendering.gl_backend() or "")
    env = make_env(task, "lidar", 1, seed=0, render=True)
    env.reset()
    frame = env.render()
    assert frame.shape == (240, 320, 3)
    model = env._sim._env.model  # pyright: ignore[reportAttributeAccessIssue]
    assert "track" in [model.camera(i).name for i in range(model.ncam)]  # else: a free camera, silently
    env.close()
