"""Which OpenGL there is for pictures without a screen. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from functools import cache

from common.types import UserError

FRAME_SIZE = (320, 240)  # width, height of the outside view, pixels

# Backend of MuJoCo -> shared libraries it needs, in the order of preference.
_BACKENDS = {"egl": ("EGL", "GLESv2"), "osmesa": ("OSMesa",)}


def gl_backend() -> str | None:
    """The headless OpenGL backend that can be loaded here: "egl", "osmesa" or None."""
    for backend, libraries in _BACKENDS.items():
        if all(_loads(library) for library in libraries):
            return backend
    return None


def require_gl() -> str:
    """The backend of this process, chosen (`MUJOCO_GL` is set) unless the user has.

    Raises `UserError` naming the Debian packages if there is none, and for a `MUJOCO_GL` that is not
    "egl", "osmesa" or "glfw" (which needs a screen).
    """
    wish = os.environ.get("MUJOCO_GL", "").strip().lower()
    if wish and wish not in (*_BACKENDS, "glfw"):
        raise UserError(f"MUJOCO_GL is {wish!r}: rendering without a screen needs egl or osmesa.")
    missing = wish in _BACKENDS and not all(_loads(library) for library in _BACKENDS[wish])
    backend = None if missing else wish or gl_backend()
    if backend is None:
        lack = f"{wish} (MUJOCO_GL) is not" if missing else "neither EGL nor OSMesa is"
        raise UserError(
            f"Rendering needs OpenGL without a screen, and {lack} installed. On Debian or "
            "Ubuntu: apt-get install libegl1 libgles2 (or libosmesa6)."
        )
    os.environ["MUJOCO_GL"] = backend
    return backend


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
