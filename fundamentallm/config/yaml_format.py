"""YAML of configs: PyYAML's safe loader with the scalars of YAML 1.2, and a repeated key as an error."""

import dataclasses
import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from fundamentallm.config.schema import Config

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
    "merge": (r"<<", "<"),
}
"""{type: (pattern, first characters)} of unquoted scalars; everything else is text.

PyYAML follows YAML 1.1, in which `no` is False, 1e-4 is text, 12:30 is 750 and 010 is 8. Here they are text, a number,
text and 10.
"""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers, yaml_constructors = {}, {None: yaml.SafeLoader.construct_undefined}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse repeated keys, before merge keys add those of other mappings."""
        node, lines = super().compose_mapping_node(anchor), dict[str, int]()
        for key, _ in node.value:
            if (name := str(key.value)) in lines:
                text = f"{name!r} is given twice, first in line {lines[name]}"
                raise ComposerError(None, None, text, key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # so that it quotes what would not read as text


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, ""])
for _name in ("null", "bool", "float", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _name, yaml.SafeLoader.yaml_constructors[_TAG + _name])
_Loader.add_constructor(_TAG + "int", lambda loader, node: int(loader.construct_scalar(node)))  # type: ignore[arg-type]


def from_yaml(text: str) -> Any:
    """Returns what a YAML text says, as plain data. Raises ValueError, with the line and what is wrong."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(line + ", ".join(part for part in (error.context, error.problem) if part)) from error
    except (yaml.YAMLError, LookupError, RecursionError) as error:  # such as a character that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from error


def to_yaml(config: Config | dict[str, Any]) -> str:
    """Returns a config, or a plain dict of settings, as YAML that reads back equal."""
    plain = dataclasses.asdict(config) if isinstance(config, Config) else config
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
