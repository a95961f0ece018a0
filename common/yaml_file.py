"""YAML files that somebody else may have written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from common.types import UserError
from common.untrusted import read_bytes, shown

_MAX_YAML = 100_000  # bytes; a complete configuration has about 6,000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, as YAML 1.2 does and YAML 1.1 does not, and refuses a key
    that stands twice in one mapping: the first one's settings would be lost in silence. It refuses merge
    keys (`<<`), too: a few nested ones unfold without an end."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name = key.value if isinstance(key.value, str) else None
            if name in seen or key.tag == "tag:yaml.org,2002:merge":
                what = (
                    f"`{shown(name)}` stands twice in one group" if name in seen else "`<<` is not supported"
                )
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*\.?([eE][-+]?\d+)|\d[\d_]*\.|\.(inf|nan))$"
    ),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping. Raises UserError for a missing file, bad syntax or anything but a mapping."""
    try:
        content = yaml.load(read_bytes(path, _MAX_YAML).decode(), _Loader)
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read as YAML: it is nested too deeply") from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {shown(str(error), 300)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    return content
