"""The value of a setting from the text that was typed, by the setting's type."""

import re
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from mutransformer.config.setting import to_text

# As YAML 1.2 writes numbers, but for 0x and 0o; without leading zeros, which another reader takes for octal.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)  # read here and refused by the setting's bounds
_REFERENCE = re.compile(r"\$\{\s*([\w.-]+)\s*\}")

Given = str | None | list[Any] | dict[Any, Any]  # what YAML holds if scalars are text


class Reference(NamedTuple):
    """A value that is not known yet, since its text refers to other settings."""

    kind: Any  # the type of the setting
    given: str | list[str]


class BadValue(ValueError):
    """Says what a value must be, and of which key if that is known."""

    key = ""


class UnknownKey(ValueError):
    """A dotted key that the schema does not have; `at` is where it stands, as the beginning of a message."""

    def __init__(self, key: str, at: str = ""):
        super().__init__(key)
        self.key, self.at = key, at


def convert(kind: Any, given: Given) -> Any:
    """The value of a setting of a type, or a Reference if the text holds ${KEY}. Raises BadValue."""
    texts = [text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str) and "${" in text]
    for text in texts:
        _check_references(text)
    if texts and isinstance(given, str):
        return Reference(kind, given)
    value = _converted(kind, given)
    return Reference(kind, value) if texts else value


def _converted(kind: Any, given: Given) -> Any:
    if get_origin(kind) is Union:  # Optional
        return None if given is None else _converted(get_args(kind)[0], given)
    if get_origin(kind) is list:
        if not isinstance(given, list):
            raise BadValue("must be a list, [a, b]")
        if not all(isinstance(item, str) for item in given):
            raise BadValue("must be a list of strings, not of lists or null")
        return list(given)
    if not isinstance(given, str):
        found = "null" if given is None else "a list" if isinstance(given, list) else "a mapping of keys to values"
        quote = "; if that is the text, put it in quotes within the value" if kind is str else ""
        raise BadValue(f"must be {_expected(kind)}, not {found}{quote}")
    value = _scalar(kind, given)
    if value is None:
        raise BadValue(f"must be {_expected(kind)}")
    return value


def _scalar(kind: Any, text: str) -> Any:
    """The value that a text stands for; None if it is none of that type."""
    if kind is int:
        return int(text) if _INTEGER.fullmatch(text) else None
    if kind is float:
        if special := _NOT_FINITE.fullmatch(text):
            text = "".join(special.groups())
        return float(text) if special or _FLOAT.fullmatch(text) else None
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower()) if text in (text.lower(), text.upper(), text.title()) else None
    return text if kind is str or text in get_args(kind) else None


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    names = {int: "an integer in decimal digits, such as 1000", float: "a decimal number, such as 0.001 or 1e-3"}
    return (names | {bool: "true or false", str: "text"})[kind]


def _check_references(text: str) -> None:
    """Raises BadValue if a text holds a ${...} that is not the key of a setting."""
    if "${" in _REFERENCE.sub("", text):
        variable = re.search(r"env\s*:\s*(\w+)", text)
        advice = f'for an environment variable write KEY="${variable[1] if variable else "NAME"}" in the shell'
        raise BadValue(f"only ${{KEY}}, the value of another setting, is replaced; settings are saved with the run: {advice}")


def resolve(reference: Reference, settings: dict[str, Any], within: tuple[Reference, ...] = ()) -> Any:
    """The value of a setting whose text refers to others. settings: all values, nested, defaults included.

    Raises:
        BadValue: what the text becomes is not of the setting's type, refers to itself, or to a group of settings.
        UnknownKey: there is no setting of that name.
    """
    if any(reference is other for other in within):
        raise BadValue("refers to itself")

    def value_of(key: str) -> Any:
        value: Any = settings
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise UnknownKey(key)
            value = value[name]
        return resolve(value, settings, (*within, reference)) if isinstance(value, Reference) else value

    def text_of(match: re.Match[str]) -> str:
        value = value_of(match[1])
        if value is None or isinstance(value, list | dict):
            raise BadValue(f"{match[1]} is {'null' if value is None else 'a list' if isinstance(value, list) else 'a group'}")
        return to_text(value)

    def replaced(text: str) -> Given:
        if alone := _REFERENCE.fullmatch(text):
            value = value_of(alone[1])
            return value if value is None or isinstance(value, list) else text_of(alone)
        return _REFERENCE.sub(text_of, text)

    given = reference.given
    found = [replaced(item) for item in given] if isinstance(given, list) else replaced(given)
    try:
        return _converted(reference.kind, found)
    except BadValue as error:
        raise BadValue(f"{error}, not {found}" if isinstance(found, str) else str(error)) from None
