"""Which OpenGL there is for pictures without a screen. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
from functools import cache

from common.types import UserError

FRAME_SIZE = (320, 240)  # width, height of the outside view, pixels

# System -> backend of MuJoCo -> shared libraries it needs, in the order of preference.
_BACKENDS = {
    "Linux": {"egl": ("EGL", "GLESv2"), "osmesa": ("OSMesa",)},
    "Darwin": {"cgl": ("OpenGL",)},  # macOS brings it
}
_DEBIAN_PACKAGES = {"EGL": "libegl1", "GLESv2": "libgles2", "OSMesa": "libosmesa6"}  # library -> package


def backends() -> dict[str, tuple[str, ...]]:
    """What MuJoCo may render with on this system: backend -> shared libraries, the best one first."""
    return _BACKENDS.get(platform.system(), {})


def gl_backend() -> str | None:
    """The headless OpenGL backend that can be loaded here ("egl", "osmesa"; on macOS "cgl"), or None."""
    for backend, libraries in backends().items():
        if all(_loads(library) for library in libraries):
            return backend
    return None


def missing_packages() -> list[str]:
    """Debian packages of the libraries that are not found here, of all backends; none on other systems."""
    libraries = [library for needed in backends().values() for library in needed]
    return [
        package
        for library, package in _DEBIAN_PACKAGES.items()
        if library in libraries and ctypes.util.find_library(library) is None
    ]


def require_gl() -> str:
    """The backend of this process, chosen (`MUJOCO_GL` is set) unless the user has.

    Raises `UserError` saying what to install if there is none, and for a `MUJOCO_GL` that this system
    does not have; "glfw" (which needs a screen) is taken on every system.
    """
    wish = os.environ.get("MUJOCO_GL", "").strip().lower()
    known = backends()
    if wish and wish not in (*known, "glfw"):
        nearest = " or ".join(known) or "glfw and a screen"
        raise UserError(f"MUJOCO_GL is {wish!r}: rendering without a screen needs {nearest}.")
    missing = wish in known and not all(_loads(library) for library in known[wish])
    backend = None if missing else wish or gl_backend()
    if backend is None:
        raise UserError(_lack(wish))
    os.environ["MUJOCO_GL"] = backend
    return backend


def _lack(wish: str) -> str:
    """What is missing, and what helps; `wish` is the backend that the user named, or empty."""
    system = platform.system()
    if system == "Linux":
        lack = f"{wish} (MUJOCO_GL) is not" if wish else "neither EGL nor OSMesa is"
        return (
            f"Rendering needs OpenGL without a screen, and {lack} installed. On Debian or "
            "Ubuntu: apt-get install libegl1 libgles2 (or libosmesa6)."
        )
    if system == "Darwin":
        return (
            "Rendering needs OpenGL, and the one that macOS brings (CGL) does not load. Train without "
            "cameras and videos, or elsewhere."
        )
    return (
        f"Rendering without a screen works on Linux and macOS, not on {system}. Train without cameras "
        "and videos, or set MUJOCO_GL=glfw where there is a screen."
    )


@cache
def _loads(library: str) -> bool:
    name = ctypes.util.find_library(library)
    if name is None:
        return False
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
