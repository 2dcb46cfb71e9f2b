"""Settings as nested dictionaries: typed by the schema, merged, and built into its dataclasses."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from mutransformer.config.setting import to_text
from mutransformer.config.values import BadValue, Given, Reference, UnknownKey, convert, resolve
from mutransformer.errors import ConfigError

Tree = dict[str, Any]  # of values and References


def typed(group: Any, given: dict[Any, Given], prefix: str = "") -> Tree:
    """What was given for a group of settings, a dataclass, as values of their types.

    Raises:
        UnknownKey: the group has no such setting.
        BadValue: a value is not of its setting's type; its `key` is set.
    """
    kinds = {field.name: field.type for field in fields(group)}
    tree: Tree = {}
    for name, value in given.items():
        key = prefix + to_text(name)
        if name not in kinds:
            raise UnknownKey(key)
        tree[name] = _typed(kinds[name], value, key)
    return tree


def _typed(kind: Any, given: Given, key: str) -> Any:
    try:
        if not (is_dataclass(kind) or get_origin(kind) is dict):
            return convert(kind, given)
        if not isinstance(given, dict):
            raise BadValue(f"is a group of settings: set those below it, such as {key}.{_example(kind)}")
    except BadValue as error:
        error.key = key
        raise
    if is_dataclass(kind):
        return typed(kind, given, f"{key}.")
    item = get_args(kind)[1]
    return {to_text(name): _typed(item, value, f"{key}.{to_text(name)}") for name, value in given.items()}


def _example(kind: Any) -> str:
    return fields(kind)[0].name if is_dataclass(kind) else "NAME"


def kind_of(group: Any, key: str) -> Any:
    """The type of the setting with a dotted key; None if there is none."""
    kind = group
    for name in key.split("."):
        if is_dataclass(kind):
            kind = {field.name: field.type for field in fields(kind)}.get(name)
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind


def merge(tree: Tree, over: Tree) -> Tree:
    """A tree with the values of another in place of its own."""
    both = {key: merge(tree[key], value) for key, value in over.items() if isinstance(value, dict) and key in tree}
    return tree | over | both


def build(group: Any, tree: Tree, whole: Tree, prefix: str = "") -> Any:
    """A config dataclass. References are looked up in the whole tree, defaults included.

    Raises:
        UnknownKey: a Reference is to a setting that does not exist.
        ConfigError: what a Reference gives is not of its setting's type, or the dataclass refuses a value.
    """
    return group(**{field.name: _built(field.type, tree[field.name], whole, prefix + field.name) for field in fields(group)})


def _built(kind: Any, value: Any, whole: Tree, key: str) -> Any:
    if isinstance(value, Reference):
        at = f"{key}={to_text(value.given)}: "
        try:
            return resolve(value, whole)
        except BadValue as error:
            raise ConfigError(f"{at}{error}") from None
        except UnknownKey as error:
            raise UnknownKey(error.key, at) from None
    if is_dataclass(kind):
        return build(kind, value, whole, f"{key}.")
    if get_origin(kind) is dict:
        item = get_args(kind)[1]
        return {name: _built(item, one, whole, f"{key}.{name}") for name, one in value.items()}
    return value
