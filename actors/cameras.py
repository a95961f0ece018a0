"""The robot's cameras and the outside view of navigation tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import xmltodict

from actors import fast_reset, render_thread, rendering
from actors.compat import mujoco
from actors.render_thread import Canvas
from common.types import ArraySpec

IMAGE_SIZE = 64  # pixels, width and height

# safety-gymnasium 1.0.0 has no rear cameras, and shows a free camera where one is asked for. These are
# the mirror images of `vision`: on the other side of the robot's middle, looking backwards.
_REAR = {
    "Point": {"@pos": "0 0 .15", "@xyaxes": "0 1 0 -.4 0 1", "@fovy": "90"},
    "Car": {"@pos": "0 -0.1 .2", "@xyaxes": "1 0 0 0 .4 1"},
    "Racecar": {"@pos": "-0.20 0 0.05", "@euler": "1.57 1.57 0"},
}


class _XmlWithCamera:
    """Stands in for the `xmltodict` module in `safety_gymnasium.world`: robots carry a camera more."""

    unparse = staticmethod(xmltodict.unparse)

    def __init__(self, camera: dict[str, str]):
        self._camera = camera

    def parse(self, text: str) -> dict[str, Any]:
        xml = xmltodict.parse(text)
        if "mujoco" in xml:  # a robot's file; the rest are snippets of one element
            body = xml["mujoco"]["worldbody"]["body"]
            body["camera"] = [body["camera"], dict(self._camera)]
        return xml


def rear_camera(robot: str) -> AbstractContextManager[None]:
    """Worlds built inside have a camera `vision_back` on the robot: Point, Car or Racecar."""
    return fast_reset.stand_in("xmltodict", _XmlWithCamera({"@name": "vision_back", **_REAR[robot]}))


def image_specs(cameras: Sequence[str]) -> dict[str, ArraySpec]:
    """Observation keys of the cameras: image, image2, ..."""
    names = ["image", *(f"image{i}" for i in range(2, len(cameras) + 1))]
    return {name: ArraySpec((IMAGE_SIZE, IMAGE_SIZE, 3), "uint8") for name in names[: len(cameras)]}


class Vision:
    """What the cameras of a navigation task's robot see; the same pixels as the package's."""

    def __init__(self, task_id: str, task: Any, cameras: Sequence[str]):
        self._task_id, self._task, self._cameras = task_id, task, cameras
        self._renderer = render_thread.shared() if cameras else None
        self.spec = image_specs(cameras)

    def building(self) -> AbstractContextManager[None]:
        """Inside, the task must build its worlds: they have every camera."""
        if "vision_back" in self._cameras:
            return rear_camera(self._task.agent_name)
        return nullcontext()

    def read(self) -> dict[str, np.ndarray]:
        """One new frame, uint8 [64, 64, 3], per key of `spec`."""
        if self._renderer is None:
            return {}
        model, data = self._task.model, self._task.data

        def paint(canvas: Canvas) -> list[np.ndarray]:
            cameras = [model.camera(name).id for name in self._cameras]  # KeyError for an unknown name
            return [
                canvas.picture(model, data, camera, visible=in_view(model, data, camera))
                for camera in cameras
            ]

        frames = self._renderer.draw(
            self._task_id,
            (IMAGE_SIZE, IMAGE_SIZE),
            lambda: fast_reset.with_true_sky(self._task.world),
            paint,
        )
        return dict(zip(self.spec, frames, strict=True))


def in_view(model: Any, data: Any, camera: int) -> np.ndarray:
    """Which geoms a camera with a square picture may see, bool [ngeom].

    Left out are those whose bounding spheres lie outside the pyramid of view, and whose reflections in
    the shiny floor (z = 0) do so too. Most objects are behind the robot or beside it, and MuJoCo would
    draw them all, twice.
    """
    origin, rotation = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
    half = np.deg2rad(model.cam_fovy[camera]) / 2
    radius = 1.01 * model.geom_rbound + 0.01  # well on the safe side, m
    seen = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE  # has no bounding sphere
    for reflection in (1.0, -1.0):
        centre = (data.geom_xpos * (1.0, 1.0, reflection) - origin) @ rotation
        sideways = np.abs(centre[:, :2]).max(axis=1)
        # Signed distance to the nearest side of the pyramid; the camera looks along -z.
        outside = sideways * np.cos(half) + centre[:, 2] * np.sin(half)
        seen |= (outside < radius) & (centre[:, 2] < radius)
    return seen


class OutsideView:
    """Stands in for the package's viewer, so that `task.render` draws on the shared context."""

    def __init__(self, task_id: str, task: Any):
        self._task_id, self._task = task_id, task
        self._renderer = render_thread.shared()
        # What the package's render code touches.
        self.vopt = mujoco.MjvOption()
        self._markers: list[dict[str, Any]] = []
        self._overlays: dict[Any, Any] = {}

    def add_marker(self, **marker: Any) -> None:
        self._markers.append(marker)

    def render(self, render_mode: str, camera_id: int) -> np.ndarray:
        """The picture of one camera, uint8 [240, 320, 3]."""
        assert render_mode == "rgb_array"
        assert camera_id >= 0  # else MuJoCo silently shows a free camera
        model, data, markers = self._task.model, self._task.data, tuple(self._markers)
        return self._renderer.draw(
            self._task_id,
            rendering.FRAME_SIZE,
            lambda: fast_reset.with_true_sky(self._task.world),
            lambda canvas: canvas.picture(model, data, camera_id, markers=markers),
        )
