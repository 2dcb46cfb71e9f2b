"""The grid of a study, parsed from the command line: configs by width or depth, learning rates, seeds. Does not import JAX."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mutransformer.config.load import load
from mutransformer.config.schema import Config, flatten
from mutransformer.errors import ConfigError, check
from mutransformer.mup.checks.slopes import Axis

Point = tuple[float, int]  # (base learning rate, seed)
T = TypeVar("T", int, float)

KEYS: dict[Axis, str] = {"width": "model.d_model", "depth": "model.n_layer"}
OPTIONS = {"optim.lr": "--lrs", "seed": "--seeds", "model.d_model": "--widths"}  # not to be swept by --set
COMMA = re.compile(r",(?![^\[{]*[\]}])")  # outside brackets


@dataclass(frozen=True)
class VariantConfig:
    """One variant of the model at one width and depth; its runs differ only in learning rate and seed."""

    name: str
    config: Config

    @property
    def width(self) -> int:
        return self.config.model.d_model


def configs(
    args: Sequence[str], axis: Axis, sizes: Sequence[int], sets: Sequence[str] = (), label: str | None = None
) -> list[VariantConfig]:
    """A config for each combination of swept settings, each "key=value,value,...", at each width or depth.

    A variant's name is the label, or without one the parametrization, and its swept settings. Raises ConfigError if a setting is
    invalid or does not fit a size, or if two variants would have the same name.
    """
    found: dict[tuple[str, int], VariantConfig] = {}
    for combination in itertools.product(*map(_settings, sets)):
        swept = [setting for setting in combination if not setting.startswith("optim.rule=")]
        for size in sizes:
            config = load([*args, *combination, f"{KEYS[axis]}={size}"])
            name = " ".join([label or config.optim.rule, *swept])
            check((name, size) not in found, f"--set: two combinations have the name {name}; sweep optim.rule without --label")
            found[name, size] = VariantConfig(name, config)
    return list(found.values())


def _settings(text: str) -> list[str]:
    """ "key=a,b" -> ["key=a", "key=b"]."""
    key, equals, values = text.partition("=")
    check(bool(key and equals and values), f"--set {text}: must be key=value,value,...")
    check(key not in OPTIONS, f"--set {text}: use {OPTIONS.get(key)}")
    return [f"{key}={value}" for value in COMMA.split(values)]


def integers(option: str, text: str) -> list[int]:
    """ "64,128,256" -> [64, 128, 256], ascending. Raises ConfigError."""
    return _numbers(option, text, lambda item: int(item), "integers separated by commas")


def seeds(option: str, text: str) -> list[int]:
    """As `integers`, for seeds. Raises ConfigError if one is out of range."""
    found = integers(option, text)
    check(0 <= found[0] and found[-1] < 2**31, f"{option} {text}: must lie in 0 ... 2^31 - 1")
    return found


def rates(option: str, text: str) -> list[float]:
    """Learning rates, ascending: "2^-10:2^-2:1" (first:last:step in octaves) or a list, "2^-6,0.03". Raises ConfigError."""
    parts = text.split(":")
    as_range = len(parts) == 3 and "," not in text
    form = "2^-10:2^-2:1 (first:last:step in octaves), or rates separated by commas"
    numbers = [_numbers(option, part, _rate, form)[0] for part in parts] if as_range else _numbers(option, text, _rate, form)
    check(all(0 < number < math.inf for number in numbers), f"{option} {text}: rates, and octaves between them, must be positive")
    if not as_range:
        return numbers
    first, last, step = numbers
    n = math.floor(math.log2(last / first) / step + 1e-9) + 1
    check(n >= 1, f"{option} {text}: an empty grid: the first rate is above the last")
    return [first * 2 ** (step * i) for i in range(n)]


def _rate(text: str) -> float:
    base, power, exponent = text.partition("^")
    return math.pow(float(base), float(exponent)) if power else float(text)  # ** of a negative base gives complex numbers


def _numbers(option: str, text: str, parse: Callable[[str], T], form: str) -> list[T]:
    try:
        found = [parse(item) for item in text.split(",")]
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ConfigError(f"{option} {text}: must be {form}") from None
    check(len(set(found)) == len(found), f"{option} {text}: a value is repeated")
    return sorted(found)


def non_defaults(config: Config) -> dict[str, object]:
    """The settings whose values are not the defaults, by dotted key."""
    defaults = flatten(Config())
    return {key: value for key, value in flatten(config).items() if value != defaults[key]}
