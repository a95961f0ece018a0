"""Configurations from layers: presets, files and flags.

Order, later wins: `default.yaml`, method, size, task, the method's own entries for that size and for the
observation, `--config` files, flags. Every layer passes the same typed checks, so that a wrong key or type is
refused with the place it stands in and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config import Config
from common.types import UserError
from common.untrusted import shown
from common.yaml_file import read_yaml

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_CHOICES = ("method", "size", "task")  # what chooses presets
_T = Any  # a dataclass instance


def merge(config: _T, layer: Mapping[str, Any], source: str, prefix: str = "") -> _T:
    """`config` with the values of one (nested) layer, checked against the types of the fields.

    Args:
        source: where the layer comes from, for error messages.

    Raises:
        UserError: an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in layer.items():
        name = f"{prefix}{shown(key)}"
        if key not in hints:
            raise UserError(f"{source}: there is no setting `{name}`{did_you_mean(shown(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: `{name}` is a group of settings, not the value {_quoted(value)}")
            changes[key] = merge(getattr(config, key), value, source, f"{name}.")
        else:
            changes[key] = _typed(value, hints[key], name, source)
    return dataclasses.replace(config, **changes)


def _typed(value: Any, hint: Any, name: str, source: str) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        # YAML reads a bare `off` as False.
        if value is False and "off" in choices:
            return "off"
        options = ", ".join(map(str, choices))
        hint_text = did_you_mean(shown(value), choices)
        raise UserError(f"{source}: `{name}` must be one of {options}, not {_quoted(value)}{hint_text}")
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 means a million
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise UserError(f"{source}: `{name}` must be a {hint.__name__}, not {_quoted(value)}")
    return value


def _quoted(value: Any) -> str:
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """' (did you mean `x`?)' for the nearest of the choices, or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean `{near[0]}`?)" if near else ""


def presets(kind: str) -> list[str]:
    """Names of the presets in configs/<kind>s, e.g. `presets("method")`."""
    return sorted(path.stem for path in (CONFIG_DIR / f"{kind}s").glob("*.yaml"))


def describe(kind: str, name: str) -> str:
    """The comment on the first line of a preset."""
    first = (CONFIG_DIR / f"{kind}s" / f"{name}.yaml").read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip()


def load(
    method: str | None = None,
    size: str | None = None,
    task: str | None = None,
    files: Iterable[Path] = (),
    observation: str | None = None,
) -> Config:
    """Composes default, method, size, task, the method's own entries for that size and observation, files.

    Method, size and task that are not given are those that the files name, else the defaults; the default
    method and the observation are the task's.
    """
    file_layers = [(str(path), read_yaml(path)) for path in files]
    chosen: Config = Config()
    for source, layer in file_layers:
        chosen = merge(chosen, {key: layer[key] for key in _CHOICES if key in layer}, source)
    named = {key for _, layer in file_layers for key in _CHOICES if key in layer}
    task, size = task or chosen.task, size or chosen.size
    task_layers, suited = _task_layers(task)
    method = method or (chosen.method if "method" in named or not suited else suited)
    method_layer = _preset("method", method)
    special = {key: method_layer.pop(key, {}) for key in ("sizes", "observations")}
    config = merge(Config(), read_yaml(CONFIG_DIR / "default.yaml"), "configs/default.yaml")
    source = f"configs/methods/{method}.yaml"
    for name, layer in [
        (source, method_layer),
        (f"configs/sizes/{size}.yaml", _preset("size", size)),
        *task_layers,
        (f"{source}, sizes.{size}", special["sizes"].get(size, {})),
    ]:
        config = merge(config, layer, name)
    last_word = [
        *file_layers,
        ("--env.observation", {"env": {"observation": observation}} if observation else {}),
    ]
    chosen = config
    for name, layer in last_word:
        chosen = merge(chosen, layer, name)
    by_observation = special["observations"].get(chosen.env.observation, {})
    by_size = by_observation.pop("sizes", {}).get(size, {})
    source = f"{source}, observations.{chosen.env.observation}"
    for name, layer in [(source, by_observation), (f"{source}.sizes.{size}", by_size), *last_word]:
        config = merge(config, layer, name)
    return dataclasses.replace(config, method=method, size=size, task=task)


def _preset(kind: str, name: str) -> dict[str, Any]:
    known = presets(kind)
    if name not in known:
        raise UserError(
            f"there is no {kind} `{name}`{did_you_mean(name, known)}; {kind}s: {', '.join(known)}"
        )
    return read_yaml(CONFIG_DIR / f"{kind}s" / f"{name}.yaml")


def _task_layers(task: str) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """Task presets whose `match` patterns fit, and the default method that they name, if any."""
    layers, method = [], None
    for path in sorted((CONFIG_DIR / "tasks").glob("*.yaml")):
        layer = read_yaml(path)
        if any(fnmatch.fnmatchcase(task, pattern) for pattern in layer.pop("match")):
            method = layer.pop("method", method)
            layers.append((f"configs/tasks/{path.name}", layer))
    return layers, method


def to_dict(config: _T) -> dict[str, Any]:
    """The configuration as nested dicts, as YAML and JSON hold it."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """A complete configuration, e.g. a run's config.yaml."""
    return merge(Config(), values, source)


def dump(config: Config) -> str:
    """The configuration as YAML that `read_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
