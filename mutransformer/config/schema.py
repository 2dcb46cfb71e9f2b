"""The configuration of a run: frozen dataclasses, and the only place in which a default is written.

Nothing here imports JAX, so that a mistake is reported before JAX starts. What can be judged from the numbers alone is judged
here; what depends on devices, files or a tokenizer is judged where those are first seen.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from mutransformer.config.data import DataConfig, MixedSourceConfig, SourceConfig
from mutransformer.config.kernels import AttentionKernel, unfit
from mutransformer.config.run import (
    CheckpointConfig,
    DistributedConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ProfileConfig,
)
from mutransformer.errors import ConfigError, check, check_path

# What other modules take from here, wherever it is written.
__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LogConfig",
    "MeshConfig",
    "MixedSourceConfig",
    "ProfileConfig",
    "SourceConfig",
    "check",
]

Activation = Literal["relu", "sqrelu", "gelu", "silu", "swiglu"]
AttentionActivation = Literal["softmax", "sqrelu", "elu", "norm_sqrelu", "norm_elu"]
Rule = Literal["sp", "mup", "abs_mup", "mup_table8", "completep", "completed_p"]
Remat = Literal["none", "dots", "attention", "outputs", "full"]
Float = Literal["float32", "bfloat16"]  # not float16: gradients would need a loss scale

DEPTH_RULES = ("completep", "completed_p")  # those that scale with n_layer / n_layer_base


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer. For transfer over width keep everything but d_model fixed, d_head and d_base included."""

    d_model: int = 128
    d_base: int = 128  # the width at which the learning rate was tuned
    d_head: int = 64
    n_layer: int = 6
    n_layer_base: Optional[int] = None  # the depth at which it was tuned, for the rules that scale with depth; None: n_layer
    n_kv_head: Optional[int] = None  # None: one per query head; 1: multi-query; between: grouped
    ff_multiple: float = 4.0  # feed-forward width / d_model
    n_vocab: Optional[int] = None  # None: the tokenizer's size
    vocab_multiple: int = 128  # the vocabulary is padded to a multiple of this; padding never gets probability
    activation: Activation = "relu"
    attention_activation: AttentionActivation = "softmax"
    attention_kernel: AttentionKernel = "auto"  # auto: splash attention on a TPU, cuDNN's on an NVIDIA GPU, where they are faster
    qk_scale: Optional[float] = None  # attention logits are qk_scale * (q . k); None: 1 / d_head
    qk_norm: bool = False
    embed_norm: bool = False
    norm_scale: Literal["none", "vector", "scalar"] = "none"
    biases: bool = False
    rotary_base: float = 10000.0  # 0: no position encoding
    norm_eps: float = 1e-5
    q_init: Literal["fan_in", "zero"] = "fan_in"
    residual_init: Literal["fan_in", "zero"] = "fan_in"  # the projections that write to the residual stream
    unembed_init: Literal["rule", "mup", "sp", "zero"] = "rule"  # std 1/d_model, 1/sqrt(d_model), 0; rule: as optim.rule says
    head_chunk: Optional[int] = None  # tokens (a device) whose logits exist at a time; None: 512 on a CPU, else 512 MiB of them
    remat: Remat = "none"  # what a layer computes again in the backward pass, from full (all, its input is kept) down to none

    def __post_init__(self) -> None:
        for key in ("d_model", "d_base", "d_head", "n_layer", "vocab_multiple", "head_chunk"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"model.{key} = {value}: must be at least 1")
        heads = max(1, self.d_model // self.d_head)
        check(
            self.d_model % self.d_head == 0,
            f"model.d_model = {self.d_model}: not divisible by model.d_head = {self.d_head}; "
            f"the nearest that fit are {heads * self.d_head} and {(heads + 1) * self.d_head}",
        )
        check(
            self.n_head % self.kv_heads == 0,
            f"model.n_kv_head = {self.n_kv_head}: must divide the {self.n_head} heads (d_model / d_head)",
        )
        check(self.d_head % 2 == 0 or self.rotary_base == 0, f"model.d_head = {self.d_head}: rotary positions need an even size")
        check(0 < self.ff_multiple < math.inf, f"model.ff_multiple = {self.ff_multiple}: must be positive and finite")
        check(self.d_ff >= 1, f"model.ff_multiple = {self.ff_multiple}: gives a feed-forward width of {self.d_ff}")
        check(
            self.n_layer_base is None or self.n_layer_base >= 1,
            f"model.n_layer_base = {self.n_layer_base}: must be at least 1",
        )
        check(self.n_vocab is None or self.n_vocab >= 2, f"model.n_vocab = {self.n_vocab}: must be at least 2")
        check(self.qk_scale is None or self.qk_scale > 0, f"model.qk_scale = {self.qk_scale}: must be positive")
        check(self.rotary_base >= 0, f"model.rotary_base = {self.rotary_base}: must be positive, or 0 for no positions")
        check(self.norm_eps > 0, f"model.norm_eps = {self.norm_eps}: must be positive")

    @property
    def n_head(self) -> int:
        return self.d_model // self.d_head

    @property
    def kv_heads(self) -> int:
        """Key/value heads; an n_kv_head out of range gives a number that divides nothing, so that the check above reports it."""
        if self.n_kv_head is None:
            return self.n_head
        return self.n_kv_head if self.n_kv_head >= 1 else self.n_head + 1

    @property
    def d_ff(self) -> int:
        return int(self.ff_multiple * self.d_model)

    @property
    def logit_scale(self) -> float:
        """The factor on q . k."""
        return 1 / self.d_head if self.qk_scale is None else self.qk_scale

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: n_vocab rounded up to vocab_multiple."""
        if self.n_vocab is None:
            raise ConfigError("model.n_vocab is not known yet: it comes from the tokenizer, or set it")
        return -(-self.n_vocab // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and how it scales with the model's size. Every rate is lr x rule(weight) x schedule(step)."""

    name: Literal["adamw", "lion", "muon"] = "adamw"  # muon: for the matrices of the layers; adamw for the rest
    rule: Rule = "mup"  # the parametrization: a table in mutransformer/mup.py
    depth_alpha: float = 1.0  # completep, completed_p: residual branches x (n_layer / n_layer_base)^-this; 0.5 ... 1
    batch_base: Optional[int] = None  # completed_p: tokens a step at which it was tuned; None: as many as now
    tokens_base: Optional[int] = None  # completed_p: tokens in all with which it was tuned; None: as many as now
    lr: float = 2**-6
    embed_lr_exponent: float = 0.0  # embedding's rate x (d_model / d_base)^this; published: 0 (muP), -0.5 (large vocabularies)
    muon_lr: float = 1.0  # muon: the rate of its matrices is lr x this x sqrt(fan_out / fan_in)
    muon_beta: float = 0.95  # muon: momentum
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    eps_scaling: bool = False  # eps follows the learning rate's factor
    weight_decay: float = 0.0
    decay: Literal["independent", "coupled"] = "independent"  # shrink by weight_decay x schedule, or by weight_decay x rate
    decay_exponent: Optional[float] = None  # hidden and output weight_decay x (d_model / d_base)^this; None: as rule says
    decay_vectors: bool = False  # also decay gains and biases
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up, down to min_lr_ratio
    warmup_steps: int = 100  # linear from min_lr_ratio to 1; a shorter run ends within it
    min_lr_ratio: float = 1e-4  # where the schedule starts and ends, as a share of lr
    grad_accumulation_steps: int = 1  # a batch is worked off in this many parts
    # Gradients are summed over devices after each part, or once a step, all weights and gradients being whole along x meanwhile.
    grad_sync: Literal["microbatch", "step"] = "microbatch"  # with grad_accumulation_steps > 1
    z_loss: float = 0.0  # adds this times the mean of (log of the softmax's normaliser)^2 to what is minimised; published: 1e-4
    loss_per: Literal["target", "position"] = "target"  # the loss is the mean over unmasked targets, or over all positions

    def __post_init__(self) -> None:
        check(self.lr > 0, f"optim.lr = {self.lr}: must be positive")
        for key in ("beta1", "beta2", "muon_beta"):
            check(0 <= getattr(self, key) < 1, f"optim.{key} = {getattr(self, key)}: must lie in [0, 1)")
        for key in ("weight_decay", "clip_norm", "warmup_steps", "z_loss"):
            check(getattr(self, key) >= 0, f"optim.{key} = {getattr(self, key)}: must not be negative")
        check(self.eps > 0, f"optim.eps = {self.eps}: must be positive")  # rows of the padded vocabulary never have a gradient
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio = {self.min_lr_ratio}: must lie in [0, 1]")
        check(
            self.grad_accumulation_steps >= 1,
            f"optim.grad_accumulation_steps = {self.grad_accumulation_steps}: must be at least 1",
        )
        for key in ("batch_base", "tokens_base"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"optim.{key} = {value}: must be at least 1")
            check(value is None or self.rule == "completed_p", f"optim.{key} = {value}: needs optim.rule=completed_p")
        check(self.depth_alpha >= 0, f"optim.depth_alpha = {self.depth_alpha}: must not be negative")
        check(self.muon_lr > 0, f"optim.muon_lr = {self.muon_lr}: must be positive")
        check(
            not (self.eps_scaling and self.rule in ("sp", *DEPTH_RULES)),
            f"optim.eps_scaling = true: the rule {self.rule} has an eps of its own; use mup, abs_mup or mup_table8",
        )


@dataclass(frozen=True)
class PrecisionConfig:
    """Weights and statistics are float32 always."""

    compute: Float = "bfloat16"  # activations, gathered weights
    grad_reduce_dtype: Float = "float32"  # gradients of weights, while they are summed over devices
    mu_dtype: Float = "float32"  # the optimizer's first moment


@dataclass(frozen=True)
class Config:
    name: str = "run"  # of the run's folder; scripts take the first YAML file's name
    workdir: str = "runs"  # holds the runs' folders
    seed: int = 0
    steps: int = 1000  # updates of the weights
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    xla_tuned: bool = True  # compile the step with the options of mutransformer/flags.py for the devices
    xla: dict[str, str] = field(default_factory=dict)  # and with these, XLA's option: value
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check(
            bool(self.name) and not self.name.startswith(".") and not set(self.name) & set("/\\\0"),
            f"name = {self.name!r}: must be a plain folder name; the place is set by workdir",
        )
        check_path("workdir", self.workdir)
        check(0 <= self.seed < 2**31, f"seed = {self.seed}: must lie in 0 ... 2^31 - 1")
        check(self.steps >= 1, f"steps = {self.steps}: must be at least 1")
        check(
            self.data.batch_size % self.optim.grad_accumulation_steps == 0,
            f"optim.grad_accumulation_steps = {self.optim.grad_accumulation_steps}: "
            f"must divide data.batch_size = {self.data.batch_size}",
        )
        check(
            self.model.n_layer_base is None or self.optim.rule in DEPTH_RULES,
            f"model.n_layer_base = {self.model.n_layer_base}: the rule {self.optim.rule} does not scale with depth; "
            f"use optim.rule={' or '.join(DEPTH_RULES)}",
        )
        check(
            self.model.unembed_init in ("rule", "zero") or self.optim.rule not in ("mup_table8", "completep"),
            f"model.unembed_init = {self.model.unembed_init}: the rule {self.optim.rule} scales the unembedding by a multiplier; "
            "use rule or zero",
        )
        m = self.model
        why = unfit(m.attention_kernel, m.attention_activation, self.data.seq_len, m.d_head, self.precision.compute)
        check(why is None, f"model.attention_kernel = {m.attention_kernel}: {why}")
        for key in ("beta1", "beta2"):
            least = 1 - getattr(self.optim, key)
            check(
                self.optim.rule != "completed_p" or self.noise_ratio * least <= 1,
                f"optim.{key} = {getattr(self.optim, key)}: 1 - {key} grows with batch and falls with tokens, here by "
                f"{self.noise_ratio:g} to more than 1; choose a smaller batch, or {key} nearer to 1",
            )
        for key, value in flatten(self).items():
            check(not isinstance(value, float) or math.isfinite(value), f"{key} = {value}: must be a finite number")

    @property
    def rundir(self) -> Path:
        """Holds all that the run writes: checkpoints, TensorBoard events, metrics, the resolved config."""
        return Path(self.workdir).expanduser() / self.name

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.seq_len

    @property
    def noise_ratio(self) -> float:
        """Tokens a step over optim.batch_base, divided by tokens in all over optim.tokens_base."""
        o, now = self.optim, self.tokens_per_step
        total = self.steps * now
        return now / (o.batch_base or now) / (total / (o.tokens_base or total))

    def with_vocab(self, n_vocab: int) -> "Config":
        """This config with the tokenizer's size filled in.

        Raises:
            ConfigError: model.n_vocab is given and too small for the tokenizer.
        """
        given = self.model.n_vocab
        check(
            given is None or given >= n_vocab,
            f"model.n_vocab = {given}: the tokenizer gives ids up to {n_vocab - 1}; set {n_vocab}, or leave it out",
        )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, n_vocab=given or n_vocab))


def to_dict(config: Config) -> dict[str, Any]:
    """Every setting as nested plain dictionaries."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, for tables and comparisons."""
    return flatten_nested(to_dict(config))


def flatten_nested(nested: Any) -> dict[str, Any]:
    """The same for nested dictionaries; an empty one stays."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat.update({f"{key}.{k}": v for k, v in flatten_nested(value).items()})
        else:
            flat[key] = value
    return flat
