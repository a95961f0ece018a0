"""Draws all pictures of a process, in one thread that owns the OpenGL contexts.

A context belongs to the thread that made it and holds about 450 MB of textures; environments of one task
share one, whichever threads they live in.
"""

from __future__ import annotations

import atexit
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from actors import compat, rendering
from actors.compat import mujoco
from common.types import UserError

_T = TypeVar("_T")
Size = tuple[int, int]  # width, height, pixels
_MAX_CANVASES = 2  # a process has one task, whose environments see and are seen; only tests have several
_MAX_GEOMS = 1000
_EXIT_SECONDS = 10.0  # a driver that hangs must not keep the process alive


class Canvas:
    """An OpenGL context with the textures and meshes of one task, for pictures of one size.

    Only the render thread touches it. A larger buffer would serve smaller pictures too, but 10 % slower.
    """

    def __init__(self, model: Any, size: Size):
        width, height = size
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self._gl = _gl_context(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        self._option, self._unperturbed = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def make_current(self) -> None:
        self._gl.make_current()

    def picture(
        self,
        model: Any,
        data: Any,
        camera: int,
        *,
        visible: np.ndarray | None = None,
        markers: Sequence[dict[str, Any]] = (),
    ) -> np.ndarray:
        """What a camera of the task's current model sees, uint8 [height, width, 3]; a new array.

        Args:
            visible: bool [ngeom], geoms to draw; None draws all.
            markers: geoms to add, as the package's `add_marker` gets them.
        """
        scene, viewport = self._scene, self._viewport
        self._camera.fixedcamid = camera
        # Groups are how MuJoCo leaves geoms out; they mean nothing to the physics.
        groups = model.geom_group.copy()
        model.geom_group[:] = 0 if visible is None else np.where(visible, 0, 1)
        self._option.geomgroup[:] = [1, 0, 0, 0, 0, 0]
        try:
            mujoco.mjv_updateScene(
                model,
                data,
                self._option,
                self._unperturbed,
                self._camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                scene,
            )
        finally:
            model.geom_group[:] = groups
        for marker in markers:
            _add_marker(scene, **marker)
        mujoco.mjr_render(viewport, scene, self._context)
        pixels = np.empty((viewport.height, viewport.width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, viewport, self._context)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL counts rows from below

    def free(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _gl_context(width: int, height: int) -> Any:
    backend = rendering.require_gl()
    try:
        # Not `mujoco.GLContext`: that was settled when mujoco was imported, before MUJOCO_GL was set.
        return importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
    except Exception as error:
        raise UserError(
            f"OpenGL by MUJOCO_GL={backend} does not start ({error}); "
            "`safedreamer doctor` tells what works here."
        ) from error


def _add_marker(scene: Any, type: Any, size: Any, pos: Any, rgba: Any, label: str = "") -> None:
    if scene.ngeom >= scene.maxgeom:
        return  # markers are decoration
    geom = scene.geoms[scene.ngeom]
    rotation = np.eye(3).ravel()
    compat.clear_leftovers(geom)
    mujoco.mjv_initGeom(geom, type, np.array(size, float), np.array(pos, float), rotation, np.float32(rgba))
    geom.label = label
    scene.ngeom += 1


class RenderThread:
    """Runs paint jobs one after another, each with the canvas of its task; `close` frees everything."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future] | None] = SimpleQueue()
        self._canvases: OrderedDict[tuple[str, Size], Canvas] = OrderedDict()  # the least recently used first
        # A daemon, because the interpreter joins others before it runs the exit handler that stops it.
        self._thread = threading.Thread(target=self._work, name="render", daemon=True)
        self._thread.start()

    def call(self, job: Callable[[], _T]) -> _T:
        """What `job` returns or raises in the render thread."""
        future: Future[_T] = Future()
        self._jobs.put((job, future))
        return future.result()

    def draw(self, task: str, size: Size, make_model: Callable[[], Any], paint: Callable[[Canvas], _T]) -> _T:
        """What `paint` returns for the canvas of a task and size.

        Args:
            make_model: gives a model with the task's textures, when there is no canvas yet.
        """
        return self.call(lambda: paint(self._canvas(task, size, make_model)))

    def close(self) -> None:
        """Frees the contexts and ends the thread."""
        self._jobs.put(None)
        self._thread.join(_EXIT_SECONDS)

    def _canvas(self, task: str, size: Size, make_model: Callable[[], Any]) -> Canvas:
        key = task, size
        if key not in self._canvases:
            while len(self._canvases) >= _MAX_CANVASES:
                self._canvases.popitem(last=False)[1].free()
            self._canvases[key] = Canvas(make_model(), size)
        self._canvases.move_to_end(key)
        canvas = self._canvases[key]
        canvas.make_current()
        return canvas

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            del item, job, future  # the next job may be long in coming
        for canvas in self._canvases.values():
            canvas.free()
        self._canvases.clear()


_lock = threading.Lock()
_shared: RenderThread | None = None


def shared() -> RenderThread:
    """The render thread of this process, started by the first call.

    Raises `UserError` where no OpenGL context can be made.
    """
    global _shared
    rendering.require_gl()
    with _lock:
        if _shared is None:
            thread = RenderThread()
            try:
                thread.call(_try_gl)
            except BaseException:
                thread.close()
                raise
            # Registered after the OpenGL library's own exit handler, so that it runs before it.
            atexit.register(thread.close)
            _shared = thread
        return _shared


def _try_gl() -> None:
    context = _gl_context(*rendering.FRAME_SIZE)
    context.make_current()
    context.free()
