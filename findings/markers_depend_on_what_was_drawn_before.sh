#!/bin/sh
# One would guess: a picture of a simulator's state depends on that state. gymnasium's viewer clears its list of
# markers, MuJoCo builds the scene anew for every picture, and `mjv_initGeom` initialises a geom.
#
# What happens instead: `mjv_initGeom` leaves object type, object id, category and segment id as they were. A marker
# takes them over from whatever was drawn in its place of the scene before (or from memory that was never set). For a
# geom that claims to stand for one of the model, MuJoCo sorts translucent geoms by another distance, so that the same
# two translucent markers hide each other the other way round. gymnasium 0.29 set the fields itself; gymnasium
# 1.x leaves them to `mjv_initGeom` on MuJoCo 3.2 and newer. Pictures of equal states, one drawn by a fresh
# viewer and one by a viewer that has drawn something else before, are not equal.
#
# gymnasium 1.4.0, mujoco 3.17.0, Python 3.11 or newer, headless OpenGL (EGL). Exits with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gymnasium==1.4.0 mujoco==3.17.0 numpy==2.3.5 pyopengl==3.1.10 glfw imageio packaging
cd "$folder"
cat > show.py <<'PY'
import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer

SIZE = 96
model = mujoco.MjModel.from_xml_string("""
<mujoco>
  <visual><global offwidth="96" offheight="96"/><headlight ambient="1 1 1"/></visual>
  <worldbody>
    <camera pos="0 0 3"/>
    <geom type="plane" size="3 3 .1"/>
    <geom name="cube" type="box" size=".1 .1 .1" pos="1 1 .1" group="1"/>
  </worldbody>
</mujoco>""")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)


def marked(cube_before: bool) -> np.ndarray:
    viewer = OffScreenViewer(model, data, SIZE, SIZE)
    viewer.vopt.geomgroup[1] = cube_before
    viewer.render("rgb_array", camera_id=0)
    viewer.vopt.geomgroup[1] = False  # from now on the cube is hidden
    for z, rgba in ((1.0, (0, 0, 1, 0.5)), (0.9, (0, 1, 0, 0.5))):
        viewer.add_marker(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=np.full(3, 0.3), pos=np.array([0, 0.1, z]),
                          rgba=np.array(rgba), label="")
    picture = viewer.render("rgb_array", camera_id=0)
    geoms = [viewer.scn.geoms[i] for i in range(1, viewer.scn.ngeom)]
    print("cube drawn before:", cube_before, "| distances of the markers:",
          [round(float(geom.camdist), 2) for geom in geoms], "| colour in the middle:", picture[SIZE // 2, SIZE // 2])
    return picture


print("gymnasium", gymnasium.__version__, "mujoco", mujoco.__version__)
fresh, used = marked(False), marked(True)
changed = int((fresh != used).any(axis=-1).sum())
print("pixels that differ between the two pictures of one state:", changed, "of", SIZE * SIZE)
import os
import sys
sys.stdout.flush()
os._exit(0 if changed else 1)
PY
MUJOCO_GL=egl "$folder/venv/bin/python" show.py
