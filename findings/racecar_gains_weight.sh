#!/bin/sh
# One would guess: the mass of a robot is a fact of its XML file, which safety-gymnasium 1.0.0 carries along; another
# MuJoCo may round differently, but the robot weighs the same.
#
# What happens instead: the chassis of Racecar is a mesh without a mass of its own, and MuJoCo derives the mass from
# its volume. Until 3.0.0 the chassis weighs 17.6 g, from 3.0.1 on 24.3 g, under the same task id, without a word.
# How much that matters, is printed too: the wheels weigh the most, so that the whole car gains 0.3 %. Point, Car, Ant and
# Doggo are built from primitive shapes and keep their masses.
#
# safety-gymnasium 1.0.0 (its XML files alone); mujoco 2.3.3, 3.0.0, 3.0.1 and 3.17.0; Python 3.11, for which all four have wheels.
# Exits with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python="${PYTHON:-python3.11}"
"$python" -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install --quiet --no-deps safety-gymnasium==1.0.0 numpy==1.26.4 absl-py==2.1.0 etils==1.12.2 glfw==2.8.0 \
    pyopengl==3.1.7 importlib-resources==6.5.2 fsspec==2025.3.0 typing-extensions==4.12.2 zipp==3.21.0
cat > "$folder/weigh.py" <<'PY'
import importlib.metadata
import mujoco

files = importlib.metadata.distribution("safety-gymnasium").locate_file("safety_gymnasium/assets/xmls")
models = {name: mujoco.MjModel.from_xml_path(str(files / f"{name}.xml"))
          for name in ("point", "car", "racecar", "ant", "doggo")}
grams = {name: 1000 * float(sum(model.body_mass)) for name, model in models.items()}
chassis = 1000 * models["racecar"].body("car_body").mass[0]
print(f"mujoco {mujoco.__version__}: chassis of the racecar {chassis:.1f} g; whole robots: "
      + ", ".join(f"{name} {mass:.2f} g" for name, mass in grams.items()))
PY
for version in 2.3.3 3.0.0 3.0.1 3.17.0; do
    "$pip" install --quiet --no-deps --target "$folder/$version" "mujoco==$version"
    PYTHONPATH="$folder/$version" "$folder/venv/bin/python" "$folder/weigh.py" | tee -a "$folder/seen"
done
test "$(grep -c 'chassis of the racecar 17.6 g' "$folder/seen")" -eq 2
test "$(grep -c 'chassis of the racecar 24.3 g' "$folder/seen")" -eq 2
