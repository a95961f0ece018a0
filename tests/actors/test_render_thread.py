import threading

import numpy as np
import pytest

from actors import render_thread, rendering
from actors.compat import mujoco
from actors.render_thread import RenderThread
from common.types import UserError

needs_gl = pytest.mark.skipif(rendering.gl_backend() is None, reason="no headless OpenGL here")

_WALL = """
<mujoco>
  <asset>
    <texture name="colour" type="2d" builtin="flat" rgb1="{rgb}" width="8" height="8"/>
    <material name="wall" texture="colour" emission="1" specular="0"/>
  </asset>
  <visual><headlight ambient="0 0 0" diffuse="0 0 0" specular="0 0 0"/></visual>
  <worldbody>
    <camera pos="0 0 2"/>
    <geom type="box" size="3 3 .1" material="wall"/>
    <geom type="box" size=".1 .1 .1" pos="0 .3 1" rgba="0 0 0 1"/>
  </worldbody>
</mujoco>
"""
RED, GREEN, BLUE = np.eye(3, dtype=int)


@pytest.fixture
def thread():
    rendering.require_gl()
    made = RenderThread()
    yield made
    made.close()


def wall(rgb):
    model = mujoco.MjModel.from_xml_string(_WALL.format(rgb=" ".join(map(str, rgb))))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


class Painter:
    """Draws a wall of one colour and counts how often a canvas was made for it."""

    def __init__(self, thread, task, rgb, size=(16, 8)):
        self.thread, self.task, self.size = thread, task, size
        self.model, self.data = wall(rgb)
        self.made = 0

    def make(self):
        self.made += 1
        return self.model

    def __call__(self, **options):
        paint = lambda canvas: canvas.picture(self.model, self.data, 0, **options)  # noqa: E731
        return self.thread.draw(self.task, self.size, self.make, paint)


def colour(picture):
    return (picture[-1, 0] > 127).astype(int)


@needs_gl
def test_pictures_are_upright_and_of_their_size(thread):
    picture = Painter(thread, "red", RED)()
    assert (picture.shape, picture.dtype) == ((8, 16, 3), np.uint8)
    np.testing.assert_array_equal(colour(picture), RED)
    assert picture[0, 8, 0] < 20  # the black box is at +y: in the upper half
    np.testing.assert_array_equal(colour(picture[:, ::-1]), RED)


@needs_gl
def test_geoms_can_be_left_out_and_markers_added(thread):
    paint = Painter(thread, "red", RED)
    groups = paint.model.geom_group.copy()
    hidden = paint(visible=np.array([True, False]))
    assert (hidden[..., 0] > 127).all()
    np.testing.assert_array_equal(paint.model.geom_group, groups)
    marker = {
        "type": mujoco.mjtGeom.mjGEOM_BOX,
        "size": [0.1, 0.1, 0.1],
        "pos": [0, -0.3, 1],
        "rgba": [0, 0, 0, 1],
        "label": "",
    }
    marked = paint(markers=[marker])
    assert marked[-1, 8, 0] < 20
    assert paint()[-1, 8, 0] > 127  # for that picture only


@needs_gl
def test_markers_take_nothing_over_from_what_was_drawn_in_their_place(thread):
    """Two translucent spheres, the first where a geom of the model was drawn before.

    `mjv_initGeom` (MuJoCo 2.3.3 and 3.17) keeps the geom's object, and the sphere would go behind the other.
    """
    marker = {"type": mujoco.mjtGeom.mjGEOM_SPHERE, "size": [0.3] * 3, "label": ""}
    markers = [
        {**marker, "pos": [0, 0.0, 1.0], "rgba": [0, 0, 1, 0.5]},
        {**marker, "pos": [0, 0.1, 0.9], "rgba": [0, 1, 0, 0.5]},
    ]
    only_wall = {"visible": np.array([True, False]), "markers": markers}
    paint, other = Painter(thread, "red", RED), Painter(thread, "again", RED)
    for lit in (paint, other):
        lit.model.vis.headlight.ambient[:] = 1.0  # else every sphere is black
    paint()
    np.testing.assert_array_equal(paint(**only_wall), other(**only_wall))


@needs_gl
def test_every_task_has_its_own_textures_and_the_least_recent_leaves(thread):
    red, green, blue = (
        Painter(thread, name, rgb) for name, rgb in (("red", RED), ("green", GREEN), ("blue", BLUE))
    )
    for paint, rgb in ((red, RED), (green, GREEN), (red, RED), (blue, BLUE), (red, RED), (green, GREEN)):
        np.testing.assert_array_equal(colour(paint()), rgb)
    assert (red.made, green.made, blue.made) == (1, 2, 1)
    wide = Painter(thread, "red", RED, (32, 8))
    assert wide().shape == (8, 32, 3)


@needs_gl
def test_one_canvas_serves_many_threads(thread):
    paint = Painter(thread, "green", GREEN)
    pictures: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: pictures.append(paint())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert paint.made == 1
    assert len(pictures) == 4
    for picture in pictures:
        np.testing.assert_array_equal(picture, pictures[0])


@needs_gl
def test_errors_reach_the_caller_and_the_thread_goes_on(thread):
    def fail():
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom"):
        thread.call(fail)
    with pytest.raises(ZeroDivisionError, match="boom"):
        thread.draw("red", (16, 8), fail, lambda canvas: None)
    np.testing.assert_array_equal(colour(Painter(thread, "red", RED)()), RED)


def test_an_opengl_that_does_not_start_is_explained(monkeypatch):
    class Broken:
        def __init__(self, width, height):
            raise RuntimeError("no display")

    class Module:
        GLContext = Broken

    monkeypatch.setattr(render_thread, "_shared", None)
    monkeypatch.setattr(rendering, "require_gl", lambda: "egl")
    monkeypatch.setattr(render_thread.importlib, "import_module", lambda name: Module)
    with pytest.raises(UserError, match=r"MUJOCO_GL=egl does not start \(no display\).*doctor"):
        render_thread.shared()
    assert render_thread._shared is None
