#!/bin/sh
# One would guess: a weld with default parameters holds a body as firmly in MuJoCo 3 as in MuJoCo 2, and against turning
# as against shifting: MuJoCo scales its constraints by the inertia of what they hold, so that a load which would
# accelerate any free body alike moves any welded body alike.
#
# What happens instead: against shifting this is so in every version. Against turning, MuJoCo 2.3.3 is the firmer the
# smaller the body: it holds a cube of 20 cm 76 times more firmly than one of 2 m. Since 3.0.0 size no longer matters, and
# the same XML file holds the small cube 96 times softer. The gremlins of safety-gymnasium 1.0.0 are cubes of
# 20 cm that hang on such welds.
#
# mujoco 2.3.3, 3.0.0 and 3.17.0; Python 3.11, for which all have wheels. Exits with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install --quiet --no-deps numpy==1.26.4 absl-py==2.1.0 etils==1.12.2 glfw==2.8.0 pyopengl==3.1.7 \
    importlib-resources==6.5.2 fsspec==2025.3.0 typing-extensions==4.12.2 zipp==3.21.0
cat > "$folder/load.py" <<'PY'
import math
import mujoco
import numpy as np


def yields(half_size: float, turn: bool) -> float:
    """How far (m or rad) a welded cube gives way to a load that would accelerate it by 10 m/s2 or 10 rad/s2."""
    model = mujoco.MjModel.from_xml_string(f"""
<mujoco>
  <option gravity="0 0 0"/>
  <worldbody>
    <body name="hand" mocap="true"/>
    <body name="cube"><freejoint/><geom type="box" size="{half_size} {half_size} {half_size}" density="1"/></body>
  </worldbody>
  <equality><weld body1="hand" body2="cube"/></equality>
</mujoco>""")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    wanted, load = np.zeros(6), np.zeros(6)
    wanted[3 if turn else 0] = 10
    mujoco.mj_mulM(model, data, load, wanted)
    data.qfrc_applied[:] = load
    for _ in range(2000):  # 4 s: at rest
        mujoco.mj_step(model, data)
    return 2 * math.asin(data.qpos[4]) if turn else float(data.qpos[0])


small, large = yields(0.1, True), yields(1.0, True)
print(f"mujoco {mujoco.__version__}: shifted by {yields(0.1, False):.3e} m (20 cm) and {yields(1.0, False):.3e} m (2 m); "
      f"turned by {small:.3e} rad (20 cm) and {large:.3e} rad (2 m): ratio {large / small:.1f}")
PY
for version in 2.3.3 3.0.0 3.17.0; do
    "$pip" install --quiet --no-deps --target "$folder/$version" "mujoco==$version"
    PYTHONPATH="$folder/$version" "$folder/venv/bin/python" "$folder/load.py" | tee -a "$folder/seen"
done
test "$(sed -n 1p "$folder/seen" | grep -c 'ratio 76.1')" -eq 1
test "$(grep -c 'ratio 1.0' "$folder/seen")" -eq 2
