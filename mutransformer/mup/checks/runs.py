"""One training run of a sweep, whatever the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from beartype.door import is_bearable
from beartype.vale import Is

# The values that a line may hold; files are edited by hand. Of a list beartype checks one item, these check all.
Integer = Annotated[int, Is[lambda n: type(n) is int]]  # true and false are integers in Python
Finite = Annotated[float, Is[lambda x: math.isfinite(x)]]  # JSON's 1e999 is read as infinity
Count = Annotated[Integer, Is[lambda n: n > 0]]
Rate = Annotated[Finite, Is[lambda x: x > 0]]
Steps = Annotated[list[Integer], Is[lambda items: all(is_bearable(n, Integer) for n in items)]]
Losses = Annotated[list[Finite | None], Is[lambda items: all(is_bearable(x, Finite | None) for x in items)]]


@dataclass(frozen=True)
class Run:
    """One training run of a sweep. Losses are in nats per token; None stands for one that is not finite."""

    variant: str  # parametrization or label, and swept settings: "mup model.qk_scale=0.25"
    width: Count  # model.d_model
    lr: Rate  # the base learning rate, optim.lr
    seed: Integer  # of weights and data order
    status: Literal["finished", "diverged"]  # diverged: a loss is not finite, or the last one as has_diverged() says
    steps: Count  # updates planned; a diverged run continues, but its later losses are meaningless
    diverged_at: Integer | None  # the first step whose loss is not finite
    logged: Steps  # step numbers, ascending, at most `steps`
    train_loss: Losses  # before the update, mean over the steps since the previous logged step
    validation_loss: Finite | None  # after the last update
    seconds: Finite  # wall-clock time of the runs trained at once / their number, compilation included
    settings: dict[str, Any]  # dotted keys whose values are not the defaults

    @classmethod
    def of(
        cls, variant: str, width: int, lr: float, seed: int, losses: np.ndarray, final: float, every: int, **further: Any
    ) -> "Run":
        """A run from its training losses [steps], logged every so many steps and at the last, and the loss at its end."""
        steps, wrong = len(losses), np.flatnonzero(~np.isfinite(losses))
        logged = [*range(every, steps, every), steps]
        means = [float(np.mean(losses[a:b], dtype=np.float64)) for a, b in zip([0, *logged], logged, strict=False)]
        return cls(
            variant=variant,
            width=width,
            lr=lr,
            seed=seed,
            status="diverged" if wrong.size or has_diverged(float(losses[0]), final) else "finished",
            steps=steps,
            diverged_at=int(wrong[0]) + 1 if wrong.size else None,
            logged=logged,
            train_loss=[round(mean, 6) if math.isfinite(mean) else None for mean in means],
            validation_loss=round(final, 6) if math.isfinite(final) else None,
            **further,
        )

    @property
    def key(self) -> tuple[str, int, float, int]:
        """The identity of a run within a study."""
        return self.variant, self.width, self.lr, self.seed

    @property
    def loss(self) -> float:
        """The validation loss, infinite if the run diverged."""
        return math.inf if self.validation_loss is None or self.status == "diverged" else self.validation_loss


def has_diverged(first: float, last: float) -> bool:
    """Whether a loss that began at `first` and ended at `last` rose by twice what it was, and at least by 2, or is not finite."""
    return not last <= first + 2 * max(1.0, abs(first))


@dataclass(frozen=True)
class ScalingAxis:
    """What grows from model to model, and over which the best learning rate should stay or move as a rule says."""

    name: str  # "width"
    size: Callable[[Run], int]
    settings: frozenset[str] = frozenset()  # keys of Run.settings that may differ between the runs of one variant
    wider_is_better: bool = False  # whether a larger model must have the lower training loss at every step

    def label(self, size: int) -> str:
        """A size in words: "width 64", "131k tokens"."""
        return f"{short(size)} {self.name}" if self.name == "tokens" else f"{self.name} {size}"

    @property
    def plural(self) -> str:
        return {"tokens": "numbers of tokens", "batch": "batch sizes"}.get(self.name, f"{self.name}s")

    def span(self, sizes: Sequence[int]) -> str:
        """The range of ascending sizes in words: "widths 64 to 512"."""
        return f"{self.plural} {short(sizes[0])} to {short(sizes[-1])}"


WIDTH = ScalingAxis("width", lambda run: run.width, wider_is_better=True)


def short(size: int) -> str:
    """A size in at most four digits where that loses nothing that matters: 64, 4096, 131k, 2.62M."""
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if size >= max(factor, 10**4):
            return f"{size / factor:.3g}{letter}"
    return str(size)


def setting_values(runs: Sequence[Run], keys: Sequence[str] = ()) -> dict[str, list[str]]:
    """The distinct values, as text, of these settings; without keys: of all that are not at their default in every run."""
    keys = keys or sorted({key for run in runs for key in run.settings})
    return {key: list(dict.fromkeys(str(run.settings.get(key, "default")) for run in runs)) for key in keys}
