"""Imports safety-gymnasium 1.0.0, silently and otherwise untouched, among newer packages than its own too.

The package was written for Python 3.10, gymnasium 0.28, MuJoCo 2.3 and numpy 1. What it misses in newer
ones is put back here, in the package's own modules and classes; gymnasium, mujoco and numpy stay as they
are, but for one entry that macOS adds to a table of gymnasium's. Every repair looks for what is missing,
never at a version, and names the error that it prevents; where nothing is missing, nothing is changed.
Numbers are never touched: rewards, costs and observations are the package's on the same MuJoCo.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mujoco as _mujoco
import numpy as np

from actors import rendering

mujoco: Any = _mujoco  # compiled, without type information


def safety_gymnasium() -> ModuleType:
    """The `safety_gymnasium` module, imported on the first call (about one second)."""
    loaded = sys.modules.get("safety_gymnasium")
    if loaded is not None:
        return loaded
    _silence_notices()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Everything that safety-gymnasium builds on is imported first, so that only its own
        # modules see what is replaced meanwhile.
        import gymnasium_robotics  # noqa: F401

        with _array_tolerant_dataclasses(), _moved_wrappers():
            import safety_gymnasium as module
    for is_missing, repair in _REPAIRS:
        if is_missing():
            repair()
    return module


def _silence_notices() -> None:
    """Takes back the greetings that pygame and gymnasium-robotics print on import."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    from farama_notifications import notifications

    notifications.pop("gymnasium_robotics", None)


# ------------------------------------------------------------------------------------ while it is imported


@contextlib.contextmanager
def _array_tolerant_dataclasses() -> Iterator[None]:
    """`dataclasses.dataclass` takes numpy arrays as defaults; every instance gets its own copy.

    Python 3.11 and newer: "ValueError: mutable default <class 'numpy.ndarray'> ... use default_factory".
    safety-gymnasium gives colours as arrays.
    """
    original = dataclasses.dataclass
    dataclasses.dataclass = _array_tolerant(original)
    try:
        yield
    finally:
        dataclasses.dataclass = original


def _array_tolerant(original: Any) -> Any:
    def dataclass(cls: type | None = None, /, **options: Any) -> Any:
        def wrap(cls: type) -> type:
            for name in inspect.get_annotations(cls):
                default = cls.__dict__.get(name)
                if isinstance(default, np.ndarray):
                    setattr(cls, name, dataclasses.field(default_factory=default.copy))
            return original(cls, **options)

        return wrap if cls is None else wrap(cls)

    return dataclass


# Module of `gymnasium.wrappers` -> what safety-gymnasium imports from it -> where that is today.
_MOVED = {
    "autoreset": {"AutoResetWrapper": "gymnasium.wrappers:Autoreset"},
    "compatibility": {"EnvCompatibility": "gymnasium:Wrapper"},  # gone for good; only named, never made
    "env_checker": {"PassiveEnvChecker": "gymnasium.wrappers:PassiveEnvChecker"},
    "normalize": {
        "NormalizeObservation": "gymnasium.wrappers:NormalizeObservation",
        "NormalizeReward": "gymnasium.wrappers:NormalizeReward",
        "RunningMeanStd": "gymnasium.wrappers.utils:RunningMeanStd",
    },
    "time_limit": {"TimeLimit": "gymnasium.wrappers:TimeLimit"},
}


@contextlib.contextmanager
def _moved_wrappers() -> Iterator[None]:
    """The modules of `gymnasium.wrappers` that its 1.0 merged into others, as long as they are needed.

    gymnasium 1.0 and newer: "ModuleNotFoundError: No module named 'gymnasium.wrappers.autoreset'", and
    so on. The classes are the same but for those that normalise, which nothing here uses.
    """
    added = []
    for name, members in _MOVED.items():
        path = f"gymnasium.wrappers.{name}"
        if importlib.util.find_spec(path) is not None:
            continue
        module = ModuleType(path)
        for member, origin in members.items():
            where, _, what = origin.partition(":")
            setattr(module, member, getattr(importlib.import_module(where), what))
        sys.modules[path] = module
        added.append(path)
    try:
        yield
    finally:
        for path in added:
            del sys.modules[path]


# ------------------------------------------------------------------------------------------- afterwards


def _specs_lack_autoreset() -> bool:
    from gymnasium.envs.registration import EnvSpec

    return "autoreset" not in {field.name for field in dataclasses.fields(EnvSpec)}


def _keep_autoreset_in_specs() -> None:
    """The package's `make` finds and gives specifications with two fields that gymnasium dropped.

    gymnasium 1.0 and newer: "AttributeError: 'EnvSpec' object has no attribute 'apply_api_compatibility'",
    then "TypeError: EnvSpec.__init__() got an unexpected keyword argument 'autoreset'".
    """
    from safety_gymnasium.utils import registration

    current, find = registration.EnvSpec, registration._find_spec

    @dataclasses.dataclass
    class EnvSpec(current):
        autoreset: bool = False
        apply_api_compatibility: bool = False

    def find_spec(env_id: str) -> Any:
        found = find(env_id)
        fields = [field.name for field in dataclasses.fields(found) if field.init]
        return EnvSpec(**{name: getattr(found, name) for name in fields})

    registration.EnvSpec, registration._find_spec = EnvSpec, find_spec


def _joints_need_integers() -> bool:
    try:
        _tiny_model().jnt(np.zeros(1, np.int32))
    except (TypeError, KeyError, IndexError):
        return True
    return False


class _JointsByArray:
    """A model whose joints are found by an array that holds one id, too."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def jnt(self, joint: np.ndarray) -> Any:
        return self._model.jnt(joint.item())


def _find_joints_by_array() -> None:
    """Car, Ant and Doggo, whose sensors of joints give the joint as an array of one number.

    MuJoCo 3.0 and newer, when such an environment is made: "TypeError: jnt(): incompatible function
    arguments".
    """
    from safety_gymnasium.bases.base_agent import BaseAgent
    from safety_gymnasium.world import Engine

    original = BaseAgent._init_jnt_sensors

    @functools.wraps(original)
    def init_jnt_sensors(self: Any) -> None:
        engine = self.engine
        self.engine = Engine(_JointsByArray(engine.model), engine.data)
        try:
            original(self)
        finally:
            self.engine = engine

    BaseAgent._init_jnt_sensors = init_jnt_sensors


def _floats_need_scalars() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            float(np.zeros(1))
        except TypeError:
            return True
    return False


def _take_floats_of_arrays() -> None:
    """Ant and Doggo, whose hinge angles are read as arrays of one number.

    numpy 2.4 and newer, at a reset: "TypeError: only 0-dimensional arrays can be converted to Python
    scalars".
    """
    from safety_gymnasium.bases import base_agent

    def float_of(value: Any) -> float:
        return builtins.float(np.asarray(value).item())

    # A name of that module alone; it shadows the built-in one.
    base_agent.float = float_of  # pyright: ignore[reportAttributeAccessIssue]


def _comparisons_overflow() -> bool:
    with np.errstate(over="raise"):
        try:
            np.less(np.zeros(1, np.float32), float(np.finfo(np.float64).max))
        except FloatingPointError:
            return True
    return False


def _let_bounds_overflow() -> None:
    """Action bounds of float32 that gymnasium compares with the limits of float64.

    numpy 2.0 and newer with gymnasium 1.0 and newer, when an environment is made: "RuntimeWarning:
    overflow encountered in cast". The limits become infinite there, which is what they are for float32.
    """
    from safety_gymnasium.bases.base_agent import BaseAgent

    original = BaseAgent._build_action_space

    @functools.wraps(original)
    def build_action_space(self: Any) -> Any:
        with np.errstate(over="ignore"):
            return original(self)

    BaseAgent._build_action_space = build_action_space


def _viewers_need_sizes() -> bool:
    from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer

    return "width" in inspect.signature(OffScreenViewer).parameters


def _size_viewers() -> None:
    """Pictures of the package's own making; it leaves their size in the model.

    gymnasium 1.0 and newer, at `render`: "TypeError: OffScreenViewer.__init__() missing 2 required
    positional arguments: 'width' and 'height'".
    """
    from safety_gymnasium.bases import underlying

    viewer = underlying.OffScreenViewer

    class OffScreenViewer(viewer):
        def __init__(self, model: Any, data: Any):
            size = model.vis.global_
            super().__init__(model, data, size.offwidth, size.offheight)  # pyright: ignore[reportCallIssue]

    underlying.OffScreenViewer = OffScreenViewer


def _markers_keep_leftovers() -> bool:
    from safety_gymnasium.bases.underlying import OffScreenViewer

    class Viewer(OffScreenViewer):
        """No more of a viewer than adding a marker takes: no OpenGL."""

        def __init__(self, scene: Any):
            self.scn = scene

        def __del__(self) -> None: ...

    scene = mujoco.MjvScene(_tiny_model(), 1)
    scene.geoms[0].objtype = mujoco.mjtObj.mjOBJ_GEOM
    Viewer(scene)._add_marker_to_scene({"type": mujoco.mjtGeom.mjGEOM_SPHERE})
    return scene.geoms[0].objtype == mujoco.mjtObj.mjOBJ_GEOM


def _clear_markers() -> None:
    """Markers in pictures of the package's own making are drawn alike whatever was drawn before.

    gymnasium 1.0 and newer on MuJoCo 3.2 and newer leave to `mjv_initGeom` what they once set themselves
    (see `clear_leftovers`): equal states give unequal pictures.
    """
    from safety_gymnasium.bases import underlying

    viewer = underlying.OffScreenViewer

    class OffScreenViewer(viewer):
        def _add_marker_to_scene(self, marker: dict[str, Any]) -> None:
            clear_leftovers(self.scn.geoms[self.scn.ngeom])
            super()._add_marker_to_scene(marker)

    underlying.OffScreenViewer = OffScreenViewer


def clear_leftovers(geom: Any) -> None:
    """Marks a geom of a scene as decoration that stands for nothing in the model.

    `mjv_initGeom` (MuJoCo 2.3.3 as well as 3.17) sets neither category nor object: what was drawn in that
    place of the scene before, or lay in its memory, decides in which order translucent geoms are drawn.
    """
    geom.category = mujoco.mjtCatBit.mjCAT_DECOR
    geom.objtype = mujoco.mjtObj.mjOBJ_UNKNOWN
    geom.objid = geom.segid = -1


def _viewers_lack_cgl() -> bool:
    from gymnasium.envs.mujoco.mujoco_rendering import _ALL_RENDERERS

    return "cgl" in rendering.backends() and "cgl" not in _ALL_RENDERERS


def _add_cgl_to_viewers() -> None:
    """Pictures of velocity tasks on macOS: one more entry in gymnasium's own table of backends.

    gymnasium up to 1.4, at `render`: "RuntimeError: Environment variable MUJOCO_GL must be one of
    dict_keys(['glfw', 'egl', 'osmesa']): got 'cgl'".
    """
    from gymnasium.envs.mujoco import mujoco_rendering

    def cgl(width: int, height: int) -> Any:
        return importlib.import_module("mujoco.cgl").GLContext(width, height)

    renderers: dict[str, Any] = mujoco_rendering._ALL_RENDERERS  # pyright: ignore[reportAssignmentType]
    renderers["cgl"] = cgl


@contextlib.contextmanager
def _warnings_of_mujoco() -> Iterator[list[str]]:
    """Collects what MuJoCo would print and append to a file MUJOCO_LOG.TXT in the current directory."""
    heard: list[str] = []
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(heard.append)
    try:
        yield heard
    finally:
        mujoco.set_mju_user_warning(before)


def _total_mass_is_deprecated() -> bool:
    with _warnings_of_mujoco() as heard:
        _tiny_model('<compiler settotalmass="1"/>')
    return bool(heard)


def _make_cheetahs_quietly() -> None:
    """HalfCheetah, whose model (gymnasium's) sets the total mass in a way that is going out of use.

    MuJoCo 3.17, whenever such an environment is made, prints "WARNING: compiler attribute 'settotalmass'
    is deprecated" and appends it to a file MUJOCO_LOG.TXT wherever the program runs.
    """
    from safety_gymnasium.tasks.safe_velocity import safety_half_cheetah_velocity_v0 as module

    cheetah = module.SafetyHalfCheetahVelocityEnv
    original = cheetah.__init__

    @functools.wraps(original)
    def init(self: Any, **options: Any) -> None:
        with _warnings_of_mujoco() as heard:
            original(self, **options)
        for text in heard:
            if "settotalmass" not in text:
                warnings.warn(text, stacklevel=2)

    cheetah.__init__ = init


def _tiny_model(compiler: str = "") -> Any:
    """A model of one body on one hinge."""
    return mujoco.MjModel.from_xml_string(
        f'<mujoco>{compiler}<worldbody><body><joint/><geom size="1"/></body></worldbody></mujoco>'
    )


# What may be missing, and what puts it back.
_REPAIRS: tuple[tuple[Callable[[], bool], Callable[[], None]], ...] = (
    (_specs_lack_autoreset, _keep_autoreset_in_specs),
    (_comparisons_overflow, _let_bounds_overflow),
    (_joints_need_integers, _find_joints_by_array),
    (_floats_need_scalars, _take_floats_of_arrays),
    (_viewers_need_sizes, _size_viewers),
    (_markers_keep_leftovers, _clear_markers),
    (_viewers_lack_cgl, _add_cgl_to_viewers),
    (_total_mass_is_deprecated, _make_cheetahs_quietly),
)
