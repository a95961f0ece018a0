"""Exact fast resets of safety-gymnasium 1.0.0: the same worlds in milliseconds instead of a second."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import numpy as np
import xmltodict
import yaml

from actors.compat import mujoco

# A texture of the same index and kind as the six-image sky (191 MB decoded on every reset), but
# of one colour. Textures take no part in the physics.
_FLAT_SKY = {"@type": "skybox", "@builtin": "flat", "@width": "2", "@height": "12", "@rgb1": "0 0 0"}


# The package's module is shared by all threads of a process: one world is built at a time.
_LOCK = threading.RLock()


@cache
def _assets(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


class _LightAssets:
    """Stands in for the `yaml` module in `safety_gymnasium.world`: cached, with a flat sky."""

    FullLoader = yaml.FullLoader

    @staticmethod
    def load(file: Any, Loader: Any) -> dict:
        assets = copy.deepcopy(_assets(file.name))
        assets["textures"]["skybox"] = dict(_FLAT_SKY)
        return assets


@contextmanager
def stand_in(name: str, module: Any) -> Iterator[None]:
    """Worlds built inside use `module` where `safety_gymnasium.world` imports the module `name`."""
    from safety_gymnasium import world

    with _LOCK:
        original = getattr(world, name)
        setattr(world, name, module)
        try:
            yield
        finally:
            setattr(world, name, original)


def light_assets() -> AbstractContextManager[None]:
    """Worlds built inside have a flat sky: a reset takes milliseconds instead of a second.

    Every observation, reward and cost stays bitwise equal; only pictures differ. Whoever renders
    must build the render context on a model `with_true_sky`.
    """
    return stand_in("yaml", _LightAssets)


def with_true_sky(world: Any) -> Any:
    """A second `MjModel` of a light world that has the sky of the package: 191 MB, about a second."""
    from safety_gymnasium.world import BASE_DIR

    sky = _assets(os.path.join(BASE_DIR, "configs/assets.yaml"))["textures"]["skybox"]
    xml = copy.deepcopy(world.xml)
    assets = xml["mujoco"]["asset"]
    assets["texture"] = [sky if texture == _FLAT_SKY else texture for texture in assets["texture"]]
    return mujoco.MjModel.from_xml_string(xmltodict.unparse(xml))


def sample_layout(self: Any) -> bool:
    """Places every object at random; False if one finds no room in 100 tries.

    Takes the place of `RandomGenerator.sample_layout`. Crowded tasks draw thousands of layouts per
    reset; these are the same draws and comparisons, on Python floats instead of tiny arrays.
    """
    layout: dict[str, np.ndarray] = {}
    placed: list[tuple[float, float, float]] = []  # x, y, keepout + margin
    for name, (areas, keepout) in self.placements.items():
        for _ in range(100):
            x, y = _draw(self, areas, keepout)
            for other_x, other_y, room in placed:
                dx, dy = x - other_x, y - other_y
                if math.sqrt(dx * dx + dy * dy) < room + keepout:
                    break
            else:
                break
        else:
            return False
        layout[name] = np.array([x, y])
        placed.append((x, y, keepout + self.placements_margin))
    self.layout = layout
    return True


def _draw(generator: Any, areas: list | None, keepout: float) -> tuple[float, float]:
    if areas is not None and len(areas) > 1:
        return tuple(generator.draw_placement(areas, keepout))
    x_min, y_min, x_max, y_max = generator.placements_extents if areas is None else areas[0]
    uniform = generator.random_generator.uniform
    return uniform(x_min + keepout, x_max - keepout), uniform(y_min + keepout, y_max - keepout)
