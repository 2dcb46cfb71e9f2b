"""Settings of the optimizer, and of how it scales with the size of the model, the batch and the run."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional

from mutransformer.config.setting import check_settings, setting
from mutransformer.errors import check

Rule = Literal["sp", "mup", "abs_mup", "mup_table8", "completep", "completed_p"]
DEPTH_RULES = ("completep", "completed_p")  # those that scale with n_layer / n_layer_base

power = partial(setting, min=-10, max=10)  # beyond that a power of a ratio of sizes would overflow


@dataclass(frozen=True)
class LrFactorsConfig:
    """Constant factors on the learning rates of a kind of weight, the same at every width: tuned on the small model with lr."""

    input: float = setting(1.0, "of the embedding", above=0)
    hidden: float = setting(1.0, "of the matrices of the layers", above=0)
    output: Optional[float] = setting(None, "of the unembedding; null: 4, or 1 with optim.rule=sp", above=0)

    def __post_init__(self) -> None:
        check_settings(self, "optim.lr_factors.")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and how it scales with the model's size. Every rate is lr x rule(weight) x schedule(step)."""

    name: Literal["adamw", "lion", "muon"] = setting("adamw", "muon: for the matrices of the layers, adamw for the rest")
    rule: Rule = setting("mup", "the parametrization: a table in mutransformer/mup/rules.py")
    depth_alpha: float = setting(
        1.0, "completep, completed_p: branches x (n_layer / n_layer_base)^-this; 0.5 ... 1", min=0, max=10
    )
    batch_base: Optional[int] = setting(None, "tokens per step when tuned; null: as many as in this run", min=1)
    tokens_base: Optional[int] = setting(None, "total tokens when tuned; null: as many as here", min=1, max=2**53)
    batch_exponent: Optional[float] = power(None, "lr x (tokens per step / batch_base)^this; published: 0.5; null: as rule")
    tokens_exponent: Optional[float] = power(None, "lr x (tokens_base / total tokens)^this; published: 0.5, 0.3; null: as rule")
    lr: float = setting(2**-6, "peak learning rate at the base width", above=0)
    lr_factors: LrFactorsConfig = setting(LrFactorsConfig)
    embed_lr_exponent: float = power(0.0, "embedding's rate x (d_model / d_base)^this; published: 0, -0.5 (large vocabulary)")
    muon_lr: float = setting(1.0, "muon: the rate of its matrices is lr x this x sqrt(fan_out / fan_in)", above=0)
    muon_beta: float = setting(0.95, "muon: momentum", min=0, below=1)
    beta1: float = setting(0.9, "decay of the first moment", min=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", min=0, below=1)
    # Above 0: rows of the padded vocabulary never have a gradient.
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    eps_scaling: bool = setting(False, "eps follows the learning rate's factor")
    weight_decay: float = setting(0.0, "decoupled weight decay, see decay", min=0)
    decay: Literal["independent", "coupled"] = setting("independent", "shrink by weight_decay x schedule, or x rate (coupled)")
    decay_exponent: Optional[float] = power(None, "hidden and output weight_decay x (d_model / d_base)^this; null: as rule")
    decay_vectors: bool = setting(False, "weight decay applies to gains and biases too")
    clip_norm: float = setting(1.0, "global norm to which the gradient is clipped; 0: no clipping", min=0)
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "after the warm-up, down to min_lr_ratio")
    warmup_steps: int = setting(100, "linear warm-up from min_lr_ratio to 1; a shorter run ends within it", min=0)
    warmup_fraction: Optional[float] = setting(
        None, "warm-up as a share of the run, in place of warmup_steps, unless that is set later", min=0, below=1
    )
    min_lr_ratio: float = setting(1e-4, "where the schedule starts and ends, relative to lr", min=0, max=1)
    grad_accumulation_steps: Optional[int] = setting(
        None,
        "microbatches per batch, computed one after another; null: on one CPU device without remat as many as have 1024 tokens "
        "or more, otherwise 1",
        min=1,
        resume="free",
    )
    grad_sync: Literal["microbatch", "step"] = setting(
        "microbatch",
        "with several microbatches: sum gradients over devices after each microbatch, or once per step, which keeps "
        "weights and gradients unsharded along x meanwhile",
        resume="free",
    )
    z_loss: float = setting(0.0, "adds this x mean (log of the softmax's normalizer)^2 to the objective; published: 1e-4", min=0)
    loss_per: Literal["target", "position"] = setting("target", "the loss is a mean over unmasked targets, or all positions")

    def warmup(self, steps: int) -> int:
        """The number of updates of the warm-up in a run of so many."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * steps)

    @property
    def output_lr_factor(self) -> float:
        """The factor on the unembedding's learning rate. What 4 gains, and where, is in docs/mup.md, "What was found"."""
        given = self.lr_factors.output
        return given if given is not None else 1.0 if self.rule == "sp" else 4.0

    def __post_init__(self) -> None:
        check_settings(self, "optim.")
        for key, exponent in (("batch_base", "batch_exponent"), ("tokens_base", "tokens_exponent")):
            value = getattr(self, key)
            used = self.rule == "completed_p" or getattr(self, exponent) is not None
            check(value is None or used, f"optim.{key} = {value}: needs optim.{exponent} or optim.rule=completed_p")
        own_eps = f"optim.eps_scaling = true: the rule {self.rule} has an eps of its own; use mup, abs_mup or mup_table8"
        check(not (self.eps_scaling and self.rule in ("sp", *DEPTH_RULES)), own_eps)
