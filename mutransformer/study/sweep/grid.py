"""The grid of a study, parsed from the command line: configs by size, learning rates, seeds. Does not import JAX."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mutransformer.config.load import load
from mutransformer.config.optim import DEPTH_RULES
from mutransformer.config.schema import Config, flatten
from mutransformer.errors import ConfigError, check, redact
from mutransformer.mup.checks.slopes import Axis

Point = tuple[float, int]  # (base learning rate, seed)
T = TypeVar("T", int, float)

SweepAxis = Axis | Literal["tokens", "batch"]
KEYS: dict[SweepAxis, str] = {"width": "model.d_model", "depth": "model.n_layer", "tokens": "steps", "batch": "data.batch_size"}
SIZES: dict[SweepAxis, str] = {"width": "--widths", "depth": "--depths", "tokens": "--steps", "batch": "--batches"}
OPTIONS = {"optim.lr": "--lrs", "seed": "--seeds", "model.d_model": "--widths"}  # not to be swept by --set
# The size at which a rule that follows an axis was tuned. By default it is the run's own, and the rule does nothing.
BASES: dict[SweepAxis, str] = {"depth": "model.n_layer_base", "tokens": "optim.tokens_base", "batch": "optim.batch_base"}
COMMA = re.compile(r",(?![^\[{]*[\]}])")  # outside brackets


@dataclass(frozen=True)
class VariantConfig:
    """One variant of the model at one size; its runs differ only in learning rate and seed."""

    name: str
    config: Config
    axis: SweepAxis = "width"  # what the size is that differs between the configs of a variant

    @property
    def width(self) -> int:
        return self.config.model.d_model

    @property
    def size(self) -> int:
        """The value of the setting that KEYS names."""
        model = self.config.model
        return {"width": model.d_model, "depth": model.n_layer, "tokens": self.config.steps}.get(
            self.axis, self.config.data.batch_size
        )

    @property
    def where(self) -> str:
        """The size in words: "width 64", "steps 128"."""
        return f"{'steps' if self.axis == 'tokens' else self.axis} {self.size}"


def configs(
    args: Sequence[str], axis: SweepAxis, sizes: Sequence[int], sets: Sequence[str] = (), label: str | None = None
) -> list[VariantConfig]:
    """A config for each combination of swept settings, each "key=value,value,...", at each size: width, depth, steps or rows.

    A variant's name is the label, or without one the parametrization, and its swept settings. Raises ConfigError if a setting is
    invalid or does not fit a size, or if two variants would have the same name.
    """
    found: dict[tuple[str, int], VariantConfig] = {}
    for combination in itertools.product(*(_settings(text, OPTIONS | {KEYS[axis]: SIZES[axis]}) for text in sets)):
        swept = [setting for setting in combination if not setting.startswith("optim.rule=")]
        for size in sizes:
            config = load([*args, *combination, f"{KEYS[axis]}={size}"])
            name = redact(" ".join([label or config.optim.rule, *swept]))
            check((name, size) not in found, f"--set: two combinations have the name {name}; sweep optim.rule without --label")
            found[name, size] = VariantConfig(name, config, axis)
    return list(found.values())


def _settings(text: str, options: dict[str, str]) -> list[str]:
    """ "key=a,b" -> ["key=a", "key=b"]."""
    key, equals, values = text.partition("=")
    check(bool(key and equals and values), f"--set {text}: must be key=value,value,...")
    check(key not in options, f"--set {text}: use {options.get(key)}")
    return [f"{key}={value}" for value in COMMA.split(values)]


def check_bases(variants: Sequence[VariantConfig]) -> None:
    """Raises ConfigError if the rule follows the axis and does not know the size at which the learning rate was tuned."""
    for variant in variants:
        key, optim = BASES.get(variant.axis), variant.config.optim
        own = {"tokens": optim.tokens_exponent, "batch": optim.batch_exponent}.get(variant.axis)
        if key is not None and (own or optim.rule in (DEPTH_RULES if variant.axis == "depth" else ("completed_p",))):
            known = flatten(variant.config)[key] is not None
            unit = {"tokens": "total tokens", "batch": "tokens per step"}.get(variant.axis, "the depth")
            rule = f"optim.{variant.axis}_exponent" if own else f"the rule {optim.rule}"
            text = f"{key} = null: {rule} then does nothing over {SIZES[variant.axis]}"
            check(known, f"{text}; set it to {unit} at the size at which the rate is tuned")


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
    numbers = [_numbers(option, part, rate, form)[0] for part in parts] if as_range else _numbers(option, text, rate, form)
    check(all(0 < number < math.inf for number in numbers), f"{option} {text}: rates, and octaves between them, must be positive")
    if not as_range:
        return numbers
    first, last, step = numbers
    n = math.floor(math.log2(last / first) / step + 1e-9) + 1
    check(n >= 1, f"{option} {text}: an empty grid: the first rate is above the last")
    return [first * 2 ** (step * i) for i in range(n)]


def one_rate(option: str, text: str) -> float:
    """A learning rate, written as in a list of `rates`. Raises ConfigError."""
    check(not {":", ","} & set(text), f"{option} {text}: must be one learning rate, 2^-6.5 or 0.011")
    return rates(option, text)[0]


def rate(text: str) -> float:
    """ "2^-6.5" or "0.011" as a number. Raises ValueError, OverflowError or ZeroDivisionError."""
    base, power, exponent = text.partition("^")
    return math.pow(float(base), float(exponent)) if power else float(text)  # ** of a negative base gives complex numbers


def _numbers(option: str, text: str, parse: Callable[[str], T], form: str) -> list[T]:
    try:
        found = [parse(item) for item in text.split(",")]
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ConfigError(f"{option} {text}: must be {form}") from None
    check(len(set(found)) == len(found), f"{option} {text}: a value is repeated")
    return sorted(found)
