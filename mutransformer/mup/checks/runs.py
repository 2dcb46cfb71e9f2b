"""One training run of a sweep, whatever the model."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
    status: Literal["finished", "diverged"]  # diverged: a loss is not finite
    steps: Count  # updates planned; a diverged run continues, but its later losses are meaningless
    diverged_at: Integer | None  # the first step whose loss is not finite
    logged: Steps  # step numbers, ascending, at most `steps`
    train_loss: Losses  # before the update, mean over the steps since the previous logged step
    validation_loss: Finite | None  # after the last update
    seconds: Finite  # wall-clock time of the runs trained at once / their number, compilation included
    settings: dict[str, Any]  # dotted keys whose values are not the defaults

    @property
    def key(self) -> tuple[str, int, float, int]:
        """The identity of a run within a study."""
        return self.variant, self.width, self.lr, self.seed

    @property
    def loss(self) -> float:
        """The validation loss, infinite if the run diverged."""
        return math.inf if self.validation_loss is None or self.status == "diverged" else self.validation_loss
