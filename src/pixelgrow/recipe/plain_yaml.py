"""YAML for recipes: without its surprising values, and with names of values for messages."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML without its traps. A key that stands twice is an error.

    `1e-3` is a number. `no`, `on`, `2024-01-31`, `010` (octal in YAML 1.1) and `1:30` (sexagesimal) are words.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # `!!int x`, or digits by the thousand
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"no readable {kind}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a mapping or a list, expected a word (double braces?)", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_OURS = {
    "bool": re.compile(r"^(true|false|True|False)$"),
    "int": re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$"),
    "float": re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$"
        r"|^\.(nan|NaN|NAN)$"
    ),
}
_FIRST = {"bool": "tTfF", "int": "-+0123456789", "float": "-+0123456789."}
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in (*_OURS, "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _rule in _OURS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _rule, list(_FIRST[_kind]))


def scalar(text: str) -> Any:
    """A plain YAML scalar: a number, a truth value, None, or the text. Raises yaml.YAMLError."""
    loader = Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def kind_of(value: Any) -> str:
    """A value's kind, for messages: `a list`."""
    names = {type(None): "nothing", dict: "a mapping", list: "a list", str: f"the text {value!r}"}
    return names.get(type(value), repr(value))
