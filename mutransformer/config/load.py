"""Reading settings from YAML files and `key=value` overrides, and showing them. Does not import JAX."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mutransformer.config.schema import Config, ConfigError, check, flatten_nested


def load(args: Sequence[str]) -> Config:
    """Reads YAML files and `key=value` overrides, merged left to right over the defaults.

    Args:
        args: paths of YAML files and dotted overrides, in any order, e.g. ["configs/small.yaml", "model.d_model=512"].

    Raises:
        ConfigError: a file is missing or not YAML; a key is unknown or twice there; a value is of the wrong type or out of range.
    """
    merged = OmegaConf.structured(Config)
    first = next((arg for arg in args if is_file(arg)), None)
    if first:
        merged = OmegaConf.merge(merged, {"name": Path(first).stem})
    for arg in args:
        merged = _merge(merged, arg)
    for key, items in flatten_nested(
        OmegaConf.to_container(merged)
    ).items():  # OmegaConf lets a list within a list of strings pass
        plain = not isinstance(items, list) or all(isinstance(item, str) for item in items)
        check(plain, f"{key}: must be a list of strings, not of lists")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # what `${...}` stands for is looked up here
        raise ConfigError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    return config


def is_file(arg: str) -> bool:
    """Whether an argument is a path rather than an override."""
    try:
        return "=" not in arg or Path(arg).is_file()  # a run may be called lr=0.1
    except OSError:  # longer than any path
        return False


def _merge(merged: Any, arg: str) -> Any:
    try:
        given = OmegaConf.load(arg) if is_file(arg) else OmegaConf.from_dotlist([arg])
        check(isinstance(given, DictConfig), f"{arg}: must hold `key: value` lines")
        missing = sorted(OmegaConf.missing_keys(given))
        check(not missing, f"{arg}: no value for {', '.join(missing)}")
        return OmegaConf.merge(merged, given)
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None)
        reason = str(getattr(error, "msg", None) or error).splitlines()[0]
        if "is not a ListConfig" in reason or "incompatible container" in reason:
            reason = "must be a list, [a, b]"
        at = "" if "=" in arg or not key else f"{key}: "
        raise ConfigError(f"{arg}: {at}{reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark and "=" not in arg else ""
        raise ConfigError(f"{arg}{where}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = "" if Path(arg).suffix else "; an override is written key=value"
        raise ConfigError(f"{arg}: cannot read it: {reason}{hint}") from None


def to_yaml(config: Config) -> str:
    """Every setting as YAML, defaults included: `load` gives the same config back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe() -> str:
    """Every setting with its default, and its comment as it stands in the source."""
    return "\n".join(_describe(Config(), ""))


def _describe(config: Any, at: str) -> Iterator[str]:
    comments = _comments(type(config))
    for field in dataclasses.fields(config):
        default = getattr(config, field.name)
        if dataclasses.is_dataclass(default):
            yield from _describe(default, f"{at}{field.name}.")
            continue
        value = {"None": "null", "True": "true", "False": "false"}.get(str(default), default)
        yield f"  {at}{field.name} = {value}"
        if field.name in comments:
            yield f"      {comments[field.name]}"
        if typing.get_origin(field.type) is dict and dataclasses.is_dataclass(typing.get_args(field.type)[1]):  # of named groups
            yield from _describe(typing.get_args(field.type)[1](), f"{at}{field.name}.NAME.")


def _comments(of: type) -> dict[str, str]:
    """Of each field: the comment on the lines above it, then the one on its own line."""
    comments: dict[str, str] = {}
    for owner in (cls for cls in reversed(of.__mro__) if dataclasses.is_dataclass(cls)):
        above: list[str] = []
        for line in inspect.getsource(owner).splitlines():
            if found := re.match(r"    # (.*)", line):
                above.append(found[1])
                continue
            if found := re.match(r"    (\w+): .*?  # (.*)", line):
                comments[found[1]] = re.sub(r"\bNone\b", "null", " ".join([f"{found[2]}.", *above] if above else [found[2]]))
            above = []
    return comments
