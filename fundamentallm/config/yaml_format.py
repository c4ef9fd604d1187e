"""YAML of configs: PyYAML's safe loader with the scalars of YAML 1.2, and a repeated key as an error."""

import dataclasses
import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from fundamentallm.config.schema import Config

_TAG = "tag:yaml.org,2002:"
SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
    "merge": (r"<<", "<"),
}
"""{type: (pattern, first characters)} of unquoted scalars; everything else is text.

PyYAML follows YAML 1.1, in which `no` is False, 1e-4 is text, 12:30 is 750 and 010 is 8. Here they are text, a number,
text and 10.
"""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse repeated keys, and apply merge keys."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ComposerError(None, None, "a key has to be text", key.start_mark)
            if key.value in lines:
                text = f"{key.value!r} is given twice, first in line {lines[key.value]}"
                raise ComposerError(None, None, text, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        self.flatten_mapping(node)  # puts merged keys before own ones, which win
        node.value = list({key.value: (key, value) for key, value in node.value}.values())
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text[1:2] in ("x", "o") else 10)


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers, _Loader.yaml_constructors = {}, {None: yaml.SafeLoader.construct_undefined}
for _name, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, ""])
for _name in ("null", "bool", "float", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _name, yaml.SafeLoader.yaml_constructors[_TAG + _name])
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # so that it quotes what would not read as text


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
