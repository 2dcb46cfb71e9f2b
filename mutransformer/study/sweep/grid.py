"""What a study covers, as typed on a command line: widths, learning rates, seeds, settings. Does not import JAX."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mutransformer.config import load as settings
from mutransformer.config.schema import Config, flatten
from mutransformer.errors import ConfigError, check

T = TypeVar("T")

SEPARATOR = re.compile(r",(?![^\[{]*[\]}])")  # a comma that is not within brackets


@dataclass(frozen=True)
class Job:
    """All the runs that differ in nothing but learning rate and seed."""

    variant: str
    config: Config

    @property
    def width(self) -> int:
        return self.config.model.d_model


def jobs(args: Sequence[str], widths: Sequence[int], sets: Sequence[str], label: str | None = None) -> list[Job]:
    """A job for each combination of swept settings, and each width.

    Args:
        args: YAML files and overrides, as for training.
        widths: values of model.d_model.
        sets: "key=value,value,..." each.
        label: what to call these settings; None: by the parametrization.

    Raises:
        ConfigError: a setting is wrong, or does not go with a width.
    """
    swept = [_values(text) for text in sets]
    found = []
    for combination in itertools.product(*swept):
        for width in widths:
            config = settings.load([*args, *combination, f"model.d_model={width}"])
            told = [text for text in combination if not text.startswith("optim.rule=")]
            found.append(Job(" ".join([label or config.optim.rule, *told]), config))
    names = {(job.variant, job.width) for job in found}
    check(len(names) == len(found), "--set: two of the combinations are called the same; sweep optim.rule without --label")
    return found


def along(args: Sequence[str], axis: Literal["width", "depth"], at: Sequence[int], label: str | None = None) -> list[Job]:
    """A job for each width or depth.

    Args:
        args: YAML files and overrides, as for training.
        axis: whether `at` are values of model.d_model or model.n_layer.
        at: the values.
        label: what to call these settings; None: by the parametrization.

    Raises:
        ConfigError: a setting is wrong, or does not go with a size.
    """
    key = {"width": "model.d_model", "depth": "model.n_layer"}[axis]
    configs = [settings.load([*args, f"{key}={size}"]) for size in at]
    return [Job(label or config.optim.rule, config) for config in configs]


def _values(text: str) -> list[str]:
    key, equals, values = text.partition("=")
    check(bool(key and equals and values), f"--set {text}: must be key=value,value,...")
    swept = {"optim.lr": "--lrs", "seed": "--seeds", "model.d_model": "--widths"}
    check(key not in swept, f"--set {text}: use {swept.get(key)}")
    return [f"{key}={value}" for value in SEPARATOR.split(values)]


def integers(option: str, text: str) -> list[int]:
    """ "64,128,256" -> [64, 128, 256], ascending. Raises ConfigError."""
    return _numbers(option, text, lambda item: int(item), "whole numbers with commas between")


def seeds(option: str, text: str) -> list[int]:
    """The same for seeds. Raises ConfigError if one is no seed."""
    found = integers(option, text)
    check(0 <= found[0] and found[-1] < 2**31, f"{option} {text}: must lie in 0 ... 2^31 - 1")
    return found


def rates(option: str, text: str) -> list[float]:
    """ "2^-10:2^-2:1" -> 2^-10, 2^-9, ... 2^-2, the last number in octaves; or "2^-6,0.03": as listed. Ascending.

    Raises:
        ConfigError: it is none of these, or gives no rate.
    """
    parts = text.split(":")
    form = "2^-10:2^-2:1 (first:last:octaves between), or rates with commas between"
    if len(parts) != 3 or "," in text:
        found = _numbers(option, text, _rate, form)
        check(all(0 < rate < math.inf for rate in found), f"{option} {text}: rates must be positive")
        return found
    first, last, octaves = (_numbers(option, part, _rate, form)[0] for part in parts)
    check(
        all(0 < number < math.inf for number in (first, last, octaves)),
        f"{option} {text}: rates and the octaves between them must be positive",
    )
    n = math.floor(math.log2(last / first) / octaves + 1e-9) + 1
    check(n >= 1, f"{option} {text}: an empty grid: the first rate is above the last")
    return [first * 2 ** (octaves * i) for i in range(n)]


def _rate(text: str) -> float:
    base, power, exponent = text.partition("^")
    return math.pow(float(base), float(exponent)) if power else float(text)  # ** of a negative base gives complex numbers


def _numbers(option: str, text: str, read: Callable[[str], T], form: str) -> list[T]:
    try:
        found = [read(item) for item in text.split(",")]
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ConfigError(f"{option} {text}: must be {form}") from None
    check(len(set(found)) == len(found), f"{option} {text}: one is there twice")
    return sorted(found)  # pyright: ignore[reportArgumentType]  # int or float


def changed(config: Config) -> dict[str, object]:
    """The settings that are not the defaults, by dotted key."""
    defaults = flatten(Config())
    return {key: value for key, value in flatten(config).items() if value != defaults[key]}
