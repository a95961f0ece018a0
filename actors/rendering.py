"""Which OpenGL there is for pictures without a screen. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import ctypes.util
import os

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


def require_gl() -> None:
    """Chooses the backend for this process (`MUJOCO_GL`), unless the user has.

    Raises `UserError` naming the Debian packages if there is none.
    """
    if os.environ.get("MUJOCO_GL"):
        return
    backend = gl_backend()
    if backend is None:
        raise UserError(
            "Rendering needs OpenGL without a screen, and neither EGL nor OSMesa is installed. On Debian or "
            "Ubuntu: apt-get install libegl1 libgles2 (or libosmesa6)."
        )
    os.environ["MUJOCO_GL"] = backend


def _loads(library: str) -> bool:
    name = ctypes.util.find_library(library)
    if name is None:
        return False
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
