"""YAML whose scalars stay the text that was typed: what a text means is decided by the type of the setting, see values.py.

PyYAML reads YAML 1.1, in which no is false, 010 is 8, 1:30 is 90 and 2026-11-27 is a date.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

NULL = re.compile(r"(?:~|null|Null|NULL|)")  # unquoted, of YAML 1.2

_TAG = "tag:yaml.org,2002:"


class _TextLoader(yaml.SafeLoader):
    """Gives text, None, lists and dicts. Knows the tags of these and of plain scalars, and no other."""

    yaml_constructors = {None: yaml.SafeLoader.construct_undefined}
    yaml_implicit_resolvers = {
        **{first: [(f"{_TAG}null", re.compile(f"{NULL.pattern}$"))] for first in ("~", "n", "N", "")},
        "<": [(f"{_TAG}merge", re.compile("<<$"))],
    }

    def mapping(self, node: yaml.MappingNode) -> dict[Hashable, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
                seen.add(key.value)
        return self.construct_mapping(node, deep=True)

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)


for _kind in ("str", "int", "float", "bool", "timestamp", "merge"):  # `!!int 010` is no other text than 010
    _TextLoader.add_constructor(f"{_TAG}{_kind}", _TextLoader.construct_scalar)
_TextLoader.add_constructor(f"{_TAG}null", lambda loader, node: None)
_TextLoader.add_constructor(f"{_TAG}map", _TextLoader.mapping)
_TextLoader.add_constructor(f"{_TAG}seq", _TextLoader.sequence)


def parse(text: str) -> Any:
    """The one document of a YAML text: scalars as text, null and nothing as None. Raises yaml.YAMLError."""
    loader = _TextLoader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()
