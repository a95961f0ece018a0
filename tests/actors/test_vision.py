"""Camera observations against the untouched package: the same pixels, the same physics."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from actors import cameras, rendering, tasks
from actors.compat import mujoco, safety_gymnasium
from actors.gym_view import GymView
from actors.safety_gym import env_spec, make_env
from actors.vector_env import SafetyVectorEnv
from common.types import VECTOR, ArraySpec, UserError

needs_gl = pytest.mark.skipif(rendering.gl_backend() is None, reason="no headless OpenGL here")
IMAGE = ArraySpec((64, 64, 3), "uint8")
SEED = 3


@contextlib.contextmanager
def package(task: str, camera: str, width: int, height: int) -> Iterator[Any]:
    """The untouched package with a picture of its own making: markers, cost sphere, all geoms."""
    rendering.require_gl()
    options = {"render_mode": "rgb_array", "camera_name": camera, "width": width, "height": height}
    env = safety_gymnasium().make(task, **options).unwrapped
    yield env
    for viewer in env.task._viewers.values():  # the package leaves them to the interpreter's exit
        viewer.con.free()
        viewer.free()


def scaled(env, action):
    return env._middle + np.clip(action, -1, 1).astype(np.float64) * env._half


@needs_gl
@pytest.mark.parametrize(
    ("task", "names", "markers"),
    [
        ("SafetyPointGoal1-v0", "vision", True),
        ("SafetyRacecarButton1-v0", "vision,vision_back", True),  # gremlins and meshes, many of them unseen
        # The package's markers of lidar readings hang above the robot; one that leans as an ant does
        # sees some of them, which would show it what it must not see.
        ("SafetyAntGoal1-v0", "auto", False),
        ("SafetyCarPush1-v0", "vision", True),
        ("SafetyDoggoGoal1-v0", "auto", False),
    ],
)
def test_frames_are_the_packages_across_resets(task, names, markers):
    ours = make_env(task, "vision", 4, SEED, cameras=names)
    with package(task, "vision", 64, 64) as theirs:
        theirs.task.render_conf.lidar_markers = markers
        frames = [ours.reset()["image"]]
        theirs.reset(seed=SEED)
        expected = [theirs.render()]
        rng = np.random.default_rng(1)
        for step in range(16):
            action = rng.uniform(-1.0, 1.0, ours.spec.action_size).astype(np.float32)
            outcome = ours.step(action)
            for _ in range(outcome.env_steps):
                theirs.step(scaled(ours, action))
            frames.append(outcome.obs["image"])
            expected.append(theirs.render())
            if outcome.terminated or step == 9:
                frames.append(ours.reset()["image"])
                theirs.reset()
                expected.append(theirs.render())
    np.testing.assert_array_equal(np.stack(frames), np.stack(expected))
    assert len(np.unique(frames, axis=0)) > 10


@needs_gl
def test_the_outside_view_is_the_packages_also_beside_vision():
    task = "SafetyPointGoal1-v0"
    ours = make_env(task, "vision", 5, SEED, render=True, cameras="vision")
    seen = make_env(task, "vision", 5, SEED, cameras="vision")
    with package(task, "fixedfar", *rendering.FRAME_SIZE) as theirs:
        ours.reset()
        seen.reset()
        theirs.reset(seed=SEED)
        hazard = theirs.task.hazards.pos[0]
        costs, drawn = 0.0, []
        for _ in range(40):  # into a hazard, which draws a sphere around the robot
            x, y = theirs.task._ego_xy(hazard[:2])
            angle = np.arctan2(y, x)
            action = np.array([1.0 if abs(angle) < 0.5 else -0.2, angle], np.float32)
            outcome, unwatched = ours.step(action), seen.step(action)
            costs += outcome.cost
            for _ in range(5):
                theirs.step(scaled(ours, action))
            np.testing.assert_array_equal(outcome.obs["image"], unwatched.obs["image"])
            drawn.append(theirs.cost["cost_sum"] > 0)
            if len(drawn) % 10 == 1 or drawn[-1]:
                np.testing.assert_array_equal(ours.render(), theirs.render())
    assert costs > 0
    assert any(drawn)


def random_state(env):
    return env._sim._task.random_generator.random_generator.get_state()[1:3]


@needs_gl
@pytest.mark.parametrize("task", ["SafetyPointGoal2-v0", "SafetyCarButton1-v0", "SafetyRacecarPush1-v0"])
def test_the_rear_camera_changes_neither_physics_nor_the_front_view(task):
    both = make_env(task, "vision+lidar", 5, SEED)
    front = make_env(task, "vision+lidar", 5, SEED, cameras="vision")
    blind = make_env(task, "lidar", 5, SEED)
    assert both.spec.slices == blind.spec.slices
    for round_ in range(2):
        obs = [env.reset() for env in (both, front, blind)]
        for action in np.random.default_rng(round_).uniform(-1, 1, (15, both.spec.action_size)):
            outcomes = [env.step(action) for env in (both, front, blind)]
            assert outcomes[0][1:] == outcomes[1][1:] == outcomes[2][1:]  # reward, cost, ends: bitwise
            obs = [outcome.obs for outcome in outcomes]
            np.testing.assert_array_equal(obs[0]["image"], obs[1]["image"])
            np.testing.assert_array_equal(obs[0][VECTOR], obs[2][VECTOR])
        states = [env._sim._task.data for env in (both, blind)]  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("qpos", "qvel", "qacc_warmstart", "sensordata"):
            np.testing.assert_array_equal(getattr(states[0], name), getattr(states[1], name))
        for one, two in zip(random_state(both), random_state(blind), strict=True):
            np.testing.assert_array_equal(one, two)
    assert (obs[0]["image"] != obs[0]["image2"]).any()


@pytest.mark.parametrize(
    ("robot", "mirror"), [("Point", (-1, 1, 1)), ("Car", (1, -1, 1)), ("Racecar", (-1, 1, 1))]
)
def test_the_rear_camera_mirrors_the_front_one(robot, mirror):
    from actors import fast_reset

    env = safety_gymnasium().make(f"Safety{robot}Goal0-v0").unwrapped
    with fast_reset.light_assets(), cameras.rear_camera(robot):
        env.reset(seed=0)
    model = env.task.model
    front, back = (model.camera(name).id for name in ("vision", "vision_back"))
    np.testing.assert_allclose(model.cam_pos[back], model.cam_pos[front] * mirror, atol=1e-12)
    assert model.cam_fovy[back] == model.cam_fovy[front]
    assert model.cam_bodyid[back] == model.cam_bodyid[front]
    rotations = np.zeros((2, 9))
    for rotation, camera in zip(rotations, (front, back), strict=True):
        mujoco.mju_quat2Mat(rotation, model.cam_quat[camera])
    ahead, behind = rotations.reshape(2, 3, 3)
    np.testing.assert_allclose(behind[:, 1], ahead[:, 1] * mirror, atol=1e-12)  # up
    np.testing.assert_allclose(behind[:, 2], ahead[:, 2] * mirror, atol=1e-12)  # backwards
    np.testing.assert_allclose(behind[:, 0], -ahead[:, 0] * mirror, atol=1e-12)  # right


def test_only_what_a_camera_or_the_floor_shows_is_drawn():
    # The camera stands one metre high and looks ahead (+x) and down by 45 degrees; its field of view of
    # 90 degrees reaches from the horizon to its feet.
    positions = {
        "ahead": "2 0 .5",
        "behind": "-2 0 .5",
        "left": "1 4 .5",
        "just left": "2 2.9 .5",  # 2.9 m aside where the view is 1.8 m wide, but 1 m thick
        "mirrored": "2 0 2.5",  # above the horizon; its reflection is not
        "far above": "-.5 0 9",
    }
    sizes = {"just left": 1.0}
    geoms = "".join(
        f'<geom name="{name}" pos="{pos}" size="{sizes.get(name, 0.1)}"/>' for name, pos in positions.items()
    )
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody><camera pos="0 0 1" xyaxes="0 -1 0 1 0 1" fovy="90"/>'
        f'<geom name="floor" type="plane" size="5 5 1"/>{geoms}</worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    seen = {model.geom(i).name for i in np.flatnonzero(cameras.in_view(model, data, 0))}
    assert seen == {"floor", "ahead", "just left", "mirrored"}


@needs_gl
def test_specs_hold_exactly_what_is_observed():
    spec = env_spec("SafetyCarGoal1-v0", "vision+coordinates", 5)
    plain = env_spec("SafetyCarGoal1-v0", "coordinates", 5)
    assert spec.obs == {VECTOR: plain.obs[VECTOR], "image": IMAGE, "image2": IMAGE}
    assert spec.slices == plain.slices
    vision = env_spec("SafetyCarGoal1-v0", "vision", 5)
    assert (vision.obs, vision.slices) == ({"image": IMAGE, "image2": IMAGE}, {})
    assert env_spec("SafetyCarGoal1-v0", "vision", 5, cameras="vision_back").obs == {"image": IMAGE}
    assert env_spec("SafetyDoggoGoal1-v0", "vision", 5).obs == {"image": IMAGE}


@needs_gl
def test_images_follow_the_order_of_the_cameras_and_belong_to_the_caller():
    names = ("vision_back,vision", "auto")
    swapped, auto = (
        SafetyVectorEnv("SafetyPointGoal1-v0", "vision", 5, 2, seed=0, cameras=order) for order in names
    )
    actions = np.ones((2, 2), np.float32)
    first = auto.step(actions)
    kept = {name: np.copy(value) for name, value in first.obs.items()}
    other = swapped.step(actions).obs
    np.testing.assert_array_equal(first.obs["image"], other["image2"])
    np.testing.assert_array_equal(first.obs["image2"], other["image"])
    second = auto.step(actions)
    for name, value in kept.items():
        assert (value.shape, value.dtype) == ((2, 64, 64, 3), np.uint8)
        np.testing.assert_array_equal(first.obs[name], value)
        assert (second.obs[name] != value).any()
    single = make_env("SafetyPointGoal1-v0", "vision", 5, 0)
    one, two = single.reset()["image"], single.step(actions[0]).obs["image"]
    assert one.flags.owndata
    assert one.flags.c_contiguous
    assert not np.shares_memory(one, two)


@needs_gl
def test_environments_of_several_threads_share_the_context():
    def play(results, seed):
        env = make_env("SafetyPointGoal1-v0", "vision", 5, seed)
        frames = [env.reset()["image2"]]
        frames += [env.step(np.ones(2)).obs["image2"] for _ in range(5)]
        results[seed] = np.stack(frames)

    alone: dict[int, np.ndarray] = {}
    together: dict[int, np.ndarray] = {}
    for seed in range(2):
        play(alone, seed)
    threads = [threading.Thread(target=play, args=(together, seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        np.testing.assert_array_equal(together[seed], alone[seed])


@needs_gl
def test_resets_stay_fast():
    env = make_env("SafetyPointGoal1-v0", "vision", 5, SEED)
    env.reset()  # makes the context, unless there is one
    started = time.process_time()
    for _ in range(10):
        env.reset()
    assert (time.process_time() - started) / 10 < 0.15  # s; 0.02 on two slow cores, the package's 0.8


@pytest.mark.parametrize(
    ("task", "observation", "names", "message"),
    [
        ("SafetyPointGoal1-v0", "vision", "vision_bak", r"Point has no camera .*mean vision_back\?"),
        ("SafetyAntGoal1-v0", "vision", "vision,vision_back", r"Ant has no camera .*mean vision\?"),
        ("SafetyPointGoal1-v0", "vision", "fixednear", "It has: vision, vision_back"),
        ("SafetyPointGoal1-v0", "vision", "", "has no camera ''"),
        ("SafetyPointGoal1-v0", "vision", "vision,vision", "more than once"),
        ("SafetyPointGoal1-v0", "lidar", "vision", "uses no cameras"),
        ("SafetyHopperVelocity-v1", "vision", "auto", "no vision observation"),
        ("SafetyDoggoGoal1-v0", "vision+coordinates", "auto", r"Use --env.observation vision\+lidar"),
        ("SafetyPointGoal1-v0", "vision+lidr", "auto", r"mean vision\+lidar\?"),
    ],
)
def test_wrong_cameras_are_refused(task, observation, names, message):
    with pytest.raises(UserError, match=message):
        env_spec(task, observation, 5, cameras=names)


def test_camera_names_may_have_spaces():
    names = tasks.cameras("SafetyCarPush0-v0", "vision", "vision_back, vision")
    assert names == ("vision_back", "vision")


def test_without_gl_vision_is_refused_before_a_run(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    with pytest.raises(UserError, match=r"apt-get install libegl1 libgles2"):
        env_spec("SafetyPointGoal1-v0", "vision", 5)


@needs_gl
@pytest.mark.parametrize("observation", ["vision", "vision+coordinates"])
def test_a_gymnasium_view_has_a_dict_space(observation):
    import warnings

    from gymnasium.utils.env_checker import check_env

    view = GymView("SafetyPointGoal1-v0", observation, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        check_env(view, skip_render_check=True)
    assert [str(w.message) for w in caught if "infinity" not in str(w.message)] == []
    obs, _ = view.reset(seed=SEED)
    assert view.observation_space.contains(obs)
    assert obs["image2"].shape == (64, 64, 3)


_FRAME = """
import sys
import numpy as np
from actors.safety_gym import make_env
env = make_env("SafetyCarGoal1-v0", "vision", 5, 0, render=True)
env.reset()
images = env.step(np.ones(2)).obs
np.savez(sys.argv[1], outside=env.render(), **images)
"""


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_both_backends_draw_and_leave_in_peace(backend, tmp_path):
    if not all(rendering._loads(library) for library in rendering.backends()[backend]):
        pytest.skip(f"no {backend} here")
    names = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    done = subprocess.run(
        [sys.executable, "-c", _FRAME, str(tmp_path / "frames.npz")],
        env={**names, "MUJOCO_GL": backend},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    frames = np.load(tmp_path / "frames.npz")
    assert frames["outside"].shape == (240, 320, 3)
    for name in ("image", "image2"):
        assert frames[name][-1, :, 0].min() > 100  # the red car
        assert frames[name][0].max() < 60  # the sky
        assert len(np.unique(frames[name].reshape(-1, 3), axis=0)) > 100
