"""Declares a setting: a dataclass field with its meaning, its bounds and whether a resumed run may change it as metadata."""

import dataclasses
import json
import math
import operator
import struct
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from mutransformer.errors import ConfigError, check_path

_BOUNDS = {
    "min": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "max": ("at most", operator.le),
    "below": ("below", operator.lt),
}
INT32 = -(2**31), 2**31 - 1
_FLOAT32_SMALLEST = 2.0**-126  # what is smaller, XLA replaces by 0


def setting(
    default: Any,  # a class (list, dict or the dataclass of a group of settings) is called for it
    meaning: str = "",  # for the help; a group's is its docstring
    *,
    path: Literal["local", "url"] | None = None,  # the value is a path: a local one, or a URL too
    resume: Literal["fixed", "free"] | None = None,  # may it differ from the checkpoint's? None: as in the enclosing group
    **bounds: int | float,  # of a number: min, max (inclusive), above, below (exclusive), besides what its type holds
) -> Any:
    """Declares a field of a config dataclass."""
    assert bounds.keys() <= _BOUNDS.keys()
    metadata = {"meaning": meaning or default.__doc__, "path": path, "resume": resume, "bounds": bounds}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(group: Any, prefix: str) -> None:
    """Checks every field of a config dataclass, whose keys begin with a prefix such as "optim.", against type and metadata.

    Raises ConfigError if a value is out of bounds, not among the choices, or no path; and, since JAX computes with these, if an
    integer without a `max` does not fit in int32, or a float is not finite or out of bounds in float32.
    """
    for field in dataclasses.fields(group):
        value, path_kind = getattr(group, field.name), field.metadata["path"]
        if value is None:
            continue
        fault = _fault(value, field.type, field.metadata["bounds"])
        if fault:
            raise ConfigError(f"{prefix}{field.name} = {value}: must {fault}")
        if path_kind:
            for path in value if isinstance(value, list) else [value]:
                check_path(f"{prefix}{field.name}", str(path), urls=path_kind == "url")


def _fault(value: Any, kind: Any, bounds: dict[str, int | float]) -> str | None:
    """What a value that is not allowed must be instead; None if it is allowed."""
    kinds = (kind, *get_args(kind))
    if isinstance(value, float) and not math.isfinite(value):
        return "be a finite number"
    if get_origin(kind) is Literal and value not in get_args(kind):
        return f"be {' or '.join(get_args(kind))}"
    if not _within(value, bounds):
        return f"be {limits(bounds)}"
    if float in kinds:
        held = _float32(value)
        if not math.isfinite(held):
            return "fit in float32, up to 3.4e38"
        if held == 0 and value != 0:
            return f"fit in float32, from {_FLOAT32_SMALLEST:.2g}, or be 0"
        if not _within(held, bounds):
            return f"be {limits(bounds)} in float32, where it is {held:g}"
    elif int in kinds and "max" not in bounds and not INT32[0] <= value <= INT32[1]:
        return f"be at least {INT32[0]}" if value < 0 else f"be at most {INT32[1]}"
    return None


def _within(value: Any, bounds: dict[str, int | float]) -> bool:
    return all(_BOUNDS[name][1](value, limit) for name, limit in bounds.items())


def _float32(value: int | float) -> float:
    """The number that a float becomes on a device."""
    try:
        (held,) = struct.unpack("f", struct.pack("f", value))
    except (OverflowError, struct.error):  # the latter for an integer beyond float64
        return math.inf
    return held if abs(held) >= _FLOAT32_SMALLEST else 0.0


class Setting(NamedTuple):
    """One key of the config. A key below a group of groups has NAME for the name, as data.sources.NAME.weight."""

    key: str
    field: dataclasses.Field
    free: bool  # to change when a run resumes
    group: type | None  # the dataclass of the settings below it

    @property
    def default(self) -> Any:
        make = self.field.default_factory
        return self.field.default if make is dataclasses.MISSING else make()


def settings_of(group: type, prefix: str = "", free: bool = False) -> Iterator[Setting]:
    """Every setting of a config dataclass in order, each group before the settings in it."""
    for field in dataclasses.fields(group):
        key, resume = f"{prefix}{field.name}", field.metadata["resume"]
        free_here = free if resume is None else resume == "free"
        item, below = field.type, f"{key}."
        if get_origin(item) is dict:
            item, below = get_args(item)[1], f"{key}.NAME."
        inner = item if isinstance(item, type) and dataclasses.is_dataclass(item) else None
        yield Setting(key, field, free_here, inner)
        if inner:
            yield from settings_of(inner, below, free_here)


def to_text(value: Any) -> str:
    """A setting's value as an override writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def limits(bounds: dict[str, int | float]) -> str:
    return " and ".join(f"{_BOUNDS[name][0]} {limit}" for name, limit in bounds.items())


def type_name(kind: Any) -> str:
    """A field's type, as the help writes it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(args)
    if origin is Union:
        return " | ".join("null" if arg is type(None) else type_name(arg) for arg in args)
    return f"{origin.__name__} of {type_name(args[-1])}" if origin else kind.__name__
