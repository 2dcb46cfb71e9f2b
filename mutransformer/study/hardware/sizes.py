"""How large the parts of a report are: by kind of device, so that all of it ends in time. Does not import JAX.

The report takes at most the sum of the limits: 8 minutes on a GPU or TPU, 10 on a CPU. A section whose limit is reached is ended;
before that it leaves out what it would not complete.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class AttentionSize(NamedTuple):
    """Arguments of attention whose kernels are compared."""

    rows: int
    positions: int
    heads: int
    kv_heads: tuple[int, ...]
    d_head: int


class StepSize(NamedTuple):
    """A config whose step is timed."""

    name: str
    settings: tuple[str, ...]
    rows: int  # of a device, halved until the step fits into its memory


class SweepSize(NamedTuple):
    """A config of which several learning rates are trained one after another and at once."""

    name: str
    settings: tuple[str, ...]


class TransferSize(NamedTuple):
    """A sweep over two widths."""

    settings: tuple[str, ...]
    widths: tuple[int, int]
    rates: tuple[float, ...]  # log2
    rules: tuple[str, ...]  # the second one if there is time


@dataclass(frozen=True)
class Sizes:
    """Those of all sections. Limits are seconds of a section, the start of its process included."""

    attention: AttentionSize
    steps: tuple[StepSize, ...]  # ascending
    seconds: float  # of a repeat
    repeats: int
    traced: StepSize
    traced_steps: int
    sweep: tuple[SweepSize, ...]
    n_rates: int
    transfer: TransferSize
    limits: Mapping[str, float] = field(default_factory=dict)


_SCALE = ("scale/1b", "data.seq_len=2048")
_STUDY = ("study", "log.tensorboard=false", "eval.batches=4")
_STUDY_GPU = (*_STUDY, "model.attention_kernel=xla")  # as in results/transfer_gpu: rows are short
_RATES = (-8.0, -7.0, -6.0, -5.0, -4.0)

ACCELERATOR = Sizes(
    attention=AttentionSize(rows=2, positions=2048, heads=8, kv_heads=(8, 2), d_head=128),
    steps=(
        StepSize("134M", (*_SCALE, "model.d_model=768", "model.n_layer=12"), 16),
        StepSize("368M", (*_SCALE, "model.d_model=1024"), 16),
        StepSize("1.3B", _SCALE, 8),
    ),
    seconds=2.0,
    repeats=3,
    traced=StepSize("368M", (*_SCALE, "model.d_model=1024"), 16),
    traced_steps=3,
    sweep=(
        SweepSize("width 128", (*_STUDY_GPU, "model.d_model=128")),
        SweepSize("width 512", (*_STUDY_GPU, "model.d_model=512")),
    ),
    n_rates=8,
    transfer=TransferSize((*_STUDY_GPU, "steps=128"), (128, 512), _RATES, ("mup", "sp")),
    limits={"device": 45.0, "kernels": 75.0, "throughput": 165.0, "trace": 60.0, "sweep": 60.0, "transfer": 75.0},
)

CPU = Sizes(
    attention=AttentionSize(rows=2, positions=256, heads=4, kv_heads=(4, 2), d_head=64),
    steps=tuple(StepSize(f"width {width}", ("small", f"model.d_model={width}"), 16) for width in (128, 256, 512)),
    seconds=2.0,
    repeats=3,
    traced=StepSize("width 128", ("small",), 16),
    traced_steps=3,
    sweep=(SweepSize("width 64", (*_STUDY, "model.d_model=64")), SweepSize("width 128", (*_STUDY, "model.d_model=128"))),
    n_rates=8,
    transfer=TransferSize((*_STUDY, "steps=32", "optim.warmup_steps=4", "eval.batches=2"), (64, 128), _RATES, ("mup", "sp")),
    limits={"device": 30.0, "kernels": 60.0, "throughput": 200.0, "trace": 70.0, "sweep": 100.0, "transfer": 140.0},
)


def sizes_for(platform: str) -> Sizes:
    """The sizes for a platform as JAX names it."""
    return CPU if platform == "cpu" else ACCELERATOR
