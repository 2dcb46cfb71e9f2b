"""The configuration of a run: frozen dataclasses, and the only place in which a default is written.

Nothing here imports JAX, so that a mistake is reported before JAX starts. A value's own bounds are in the field's metadata; the
rules between several values are checked in __post_init__. What depends on devices, files or a tokenizer is checked where those
are first seen.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional

from mutransformer.config.data import DataConfig
from mutransformer.config.optim import DEPTH_RULES, OptimConfig
from mutransformer.config.run import (
    BadStepsConfig,
    CheckpointConfig,
    DistributedConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ProfileConfig,
    WatchdogConfig,
)
from mutransformer.config.setting import INT32, Setting, check_settings, setting, settings_of
from mutransformer.errors import ConfigError, check, is_url, redact

AttentionActivation = Literal["softmax", "sqrelu", "elu", "norm_sqrelu", "norm_elu"]
AttentionKernel = Literal["auto", "xla", "splash", "cudnn"]
BiasesIn = Literal["all", "layers", "attention", "feed_forward"]
Remat = Literal["none", "dots", "attention", "outputs", "full"]
Float = Literal["float32", "bfloat16"]  # not float16: gradients would need a loss scale
ComputeDtype = Literal["auto", "float32", "bfloat16"]

SPLASH_MULTIPLE = 128  # must divide the number of positions: the lanes of a TPU's vector registers
SPLASH_HEAD = 64  # must divide a head's size
CUDNN_HEAD = 8  # must divide a head's size
CUDNN_MAX_HEAD = 128  # on every GPU that has the kernel; Hopper's takes twice that


def unfit(kernel: AttentionKernel, activation: str, T: int, d_head: int, compute: str) -> str | None:
    """Why a kernel cannot compute an attention over T positions, as the end of an error message; None: it can."""
    if kernel in ("auto", "xla"):
        return None
    heads, positions = f"not model.d_head = {d_head}", f"not data.seq_len = {T}"
    limits = {f"computes softmax only, not model.attention_activation = {activation}": activation == "softmax"}
    if kernel == "splash":
        limits[f"needs a multiple of {SPLASH_MULTIPLE} positions, {positions}"] = T % SPLASH_MULTIPLE == 0
        limits[f"needs heads of a multiple of {SPLASH_HEAD}, {heads}"] = d_head % SPLASH_HEAD == 0
    else:
        fits = d_head % CUDNN_HEAD == 0 and d_head <= CUDNN_MAX_HEAD
        limits[f"computes in bfloat16, not precision.compute = {compute}"] = compute != "float32"
        limits[f"needs heads of a multiple of {CUDNN_HEAD} up to {CUDNN_MAX_HEAD}, {heads}"] = fits
        limits[f"needs an even number of positions, {positions}"] = T % 2 == 0
    return next((limit for limit, kept in limits.items() if not kept), None)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer. For transfer over width keep everything but d_model fixed, d_head and d_base included."""

    d_model: int = setting(128, "width of the residual stream", min=1)
    d_base: int = setting(128, "the width at which the learning rate was tuned", min=1)
    d_head: int = setting(64, "size of an attention head", min=1)
    attention_multiple: float = setting(1.0, "query heads x d_head / d_model", above=0)
    n_layer: int = setting(6, "layers", min=1)
    n_layer_base: Optional[int] = setting(None, "the depth at which it was tuned, for the rules with depth; null: n_layer", min=1)
    n_kv_head: Optional[int] = setting(None, "key/value heads; null: one per query head; 1: multi-query", min=1)
    ff_multiple: float = setting(4.0, "feed-forward width / d_model", above=0)
    n_vocab: Optional[int] = setting(None, "vocabulary; null: the tokenizer's size", min=2)
    vocab_multiple: int = setting(128, "the vocabulary is padded to a multiple of this, with probability 0", min=1)
    activation: Literal["relu", "sqrelu", "gelu", "silu", "swiglu"] = setting("relu", "of the feed-forward layer")
    attention_activation: AttentionActivation = setting("softmax", "of the attention logits")
    attention_kernel: AttentionKernel = setting(
        "auto", "auto: splash attention on a TPU, cuDNN's on an NVIDIA GPU, where they are faster; else xla", resume="free"
    )
    qk_scale: Optional[float] = setting(None, "attention logits are qk_scale * (q . k); null: 1 / d_head", above=0)
    embed_multiplier: float = setting(1.0, "constant factor on the embedding, the same at every width", above=0)
    residual_multiplier: float = setting(1.0, "on what a layer adds to the residual stream, besides that of the rule", above=0)
    logits_multiplier: float = setting(1.0, "on the logits, besides that of the rule", above=0)
    qk_norm: bool = setting(False, "normalize queries and keys")
    embed_norm: bool = setting(False, "normalize the embedding")
    norm_scale: Literal["none", "vector", "scalar"] = setting("none", "trained gains of the norms")
    biases: bool = setting(False, "trained biases of the projections")
    biases_in: BiasesIn = setting("all", "which projections have them, with model.biases; layers: all but the unembedding")
    rotary_base: float = setting(10000.0, "base of the rotary position encoding; 0: no position encoding", min=0)
    norm_eps: float = setting(1e-5, "added to the mean square in a norm", above=0)
    q_init: Literal["fan_in", "zero"] = setting("fan_in", "initial values of the query projection")
    residual_init: Literal["fan_in", "zero"] = setting("fan_in", "of the projections that write to the residual stream")
    unembed_init: Literal["rule", "mup", "base", "sp", "zero"] = setting(
        "rule",
        "standard deviation of the unembedding; mup: 1/d_model; base: sqrt(d_base)/d_model; sp: 1/sqrt(d_model); rule: as "
        "optim.rule says",
    )
    head_chunk: Optional[int] = setting(
        None,
        "tokens per device whose logits exist at a time; null: 512 on a CPU, else as many as fill 512 MiB",
        min=1,
        resume="free",
    )
    unroll_layers: Optional[bool] = setting(
        None,
        "layers one after another in the program, not in a loop; null: on one CPU device, for at most 12 layers without remat; "
        "on GPUs with mesh.y=1, for at most 72 without full remat",
        resume="free",
    )
    remat: Remat = setting("none", "what a layer recomputes in the backward pass; full: all but its input", resume="free")

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        self._check_heads()
        check(self.d_head % 2 == 0 or self.rotary_base == 0, f"model.d_head = {self.d_head}: rotary positions need an even size")
        fits = 1 <= self.d_ff <= INT32[1]
        check(fits, f"model.ff_multiple = {self.ff_multiple}: gives a feed-forward width of {self.d_ff}")

    def _check_heads(self) -> None:
        heads = max(1, self.d_model // self.d_head)
        fit = f"the nearest that fit are {heads * self.d_head} and {(heads + 1) * self.d_head}"
        not_divisible = f"model.d_model = {self.d_model}: not divisible by model.d_head = {self.d_head}; {fit}"
        check(self.attention_multiple != 1 or self.d_model % self.d_head == 0, not_divisible)
        exact = self.attention_multiple * self.d_model / self.d_head
        whole = 1 <= self.n_head <= INT32[1] and abs(self.n_head - exact) < 1e-9 * exact  # a ratio such as 4 / 3 is rounded
        gives = f"gives {exact:g} heads of model.d_head = {self.d_head} at model.d_model = {self.d_model}"
        check(whole, f"model.attention_multiple = {self.attention_multiple}: {gives}, which must be a whole number")
        ratio = "" if self.attention_multiple == 1 else "attention_multiple x "
        divides = self.n_head % self.kv_heads == 0
        check(divides, f"model.n_kv_head = {self.n_kv_head}: must divide the {self.n_head} heads ({ratio}d_model / d_head)")

    @property
    def n_head(self) -> int:
        """Number of query heads."""
        return round(self.attention_multiple * self.d_model / self.d_head)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def d_ff(self) -> int:
        return int(self.ff_multiple * self.d_model)

    def has_bias(self, part: Literal["attention", "feed_forward", "unembedding"]) -> bool:
        """Whether the projections of a part of the model have biases."""
        return self.biases and (self.biases_in in ("all", part) or (self.biases_in == "layers" and part != "unembedding"))

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
class PrecisionConfig:
    """Weights and statistics are always float32."""

    compute: ComputeDtype = setting(
        "auto", "activations and gathered weights; auto: bfloat16 on devices with instructions for it, else float32"
    )
    grad_reduce_dtype: Float = setting("float32", "gradients of weights while they are summed over devices")
    mu_dtype: Float = setting("float32", "the optimizer's first moment")

    def __post_init__(self) -> None:
        check_settings(self, "precision.")


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    name: str = setting("run", "the run's folder; by default the name of the first YAML file", resume="free")
    workdir: str = setting("runs", "holds the runs' folders; may be a URL: gs://bucket/runs", path="url", resume="free")
    seed: int = setting(0, "of the initial weights and the order of the data", min=0, max=2**31 - 1)
    steps: int = setting(1000, "updates of the weights", min=1)
    model: ModelConfig = setting(ModelConfig)
    data: DataConfig = setting(DataConfig, resume="free")
    optim: OptimConfig = setting(OptimConfig)
    precision: PrecisionConfig = setting(PrecisionConfig)
    mesh: MeshConfig = setting(MeshConfig, resume="free")
    xla_tuned: bool = setting(True, "XLA options by device kind: speed on a TPU, determinism on an NVIDIA GPU", resume="free")
    xla: dict[str, str] = setting(dict, "further XLA compiler options, option: value", resume="free")
    compile_cache: Optional[str] = setting(
        "~/.cache/mutransformer/compiled", "keeps compiled programs for the next start; null: none", path="local", resume="free"
    )
    distributed: DistributedConfig = setting(DistributedConfig, resume="free")
    eval: EvalConfig = setting(EvalConfig, resume="free")
    log: LogConfig = setting(LogConfig, resume="free")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, resume="free")
    bad_steps: BadStepsConfig = setting(BadStepsConfig)
    watchdog: WatchdogConfig = setting(WatchdogConfig, resume="free")
    profile: ProfileConfig = setting(ProfileConfig, resume="free")

    def __post_init__(self) -> None:
        check_settings(self, "")
        plain = bool(self.name) and not self.name.startswith(".") and not set(self.name) & set("/\\\0")
        check(plain, f"name = {self.name!r}: must be a plain folder name; the place is set by workdir")
        for key in ("name", "workdir"):
            text = getattr(self, key)
            why = "must hold no access token or password, which the name of a folder would show"
            check(redact(text) == text, f"{key} = {text}: {why}")
        model, data, optim = self.model, self.data, self.optim
        n = optim.grad_accumulation_steps or 1
        check(data.batch_size % n == 0, f"optim.grad_accumulation_steps = {n}: must divide data.batch_size = {data.batch_size}")
        why = f"the rule {optim.rule} does not scale with depth; use optim.rule={' or '.join(DEPTH_RULES)}"
        check(model.n_layer_base is None or optim.rule in DEPTH_RULES, f"model.n_layer_base = {model.n_layer_base}: {why}")
        free = model.unembed_init in ("rule", "zero") or optim.rule not in ("mup_table8", "completep")
        why = f"the rule {optim.rule} scales the unembedding by a multiplier; use rule or zero"
        check(free, f"model.unembed_init = {model.unembed_init}: {why}")
        why = unfit(model.attention_kernel, model.attention_activation, data.seq_len, model.d_head, self.precision.compute)
        check(why is None, f"model.attention_kernel = {model.attention_kernel}: {why}")
        for key in ("beta1", "beta2"):
            beta = getattr(optim, key)
            ratio = self.batch_ratio / self.tokens_ratio
            grows = f"1 - {key} grows with batch and falls with tokens, here by {ratio:g} to more than 1"
            fits = optim.rule != "completed_p" or ratio * (1 - beta) <= 1
            check(fits, f"optim.{key} = {beta}: {grows}; choose a smaller batch, or {key} nearer to 1")

    def warnings(self) -> list[str]:
        """Lines about settings that are allowed, but unlikely to be intended."""
        warmup, steps = self.optim.warmup(self.steps), self.steps
        if warmup < steps:
            return []
        reached = self.optim.min_lr_ratio + (1 - self.optim.min_lr_ratio) * steps / max(1, warmup)
        text = f"the run of {steps} steps ends within its warm-up of {warmup}, at {reached:.2g} x optim.lr"
        return [f"{text}; set optim.warmup_steps or optim.warmup_fraction"]

    @property
    def rundir(self) -> Path:
        """The folder of all that the run writes: checkpoints, TensorBoard events, metrics, the resolved config.

        Raises ConfigError if it is at a URL.
        """
        check(self.run_url is None, f"workdir = {self.workdir}: must be a local path here, not a URL")
        return Path(self.workdir.removeprefix("file://")).expanduser() / self.name

    @property
    def run_url(self) -> str | None:
        """The URL of the folder of all that the run writes, if it is at one."""
        remote = is_url(self.workdir) and not self.workdir.startswith("file://")
        return f"{self.workdir.rstrip('/')}/{self.name}" if remote else None

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.seq_len

    @property
    def batch_ratio(self) -> float:
        """Tokens per step over optim.batch_base."""
        return self.tokens_per_step / (self.optim.batch_base or self.tokens_per_step)

    @property
    def tokens_ratio(self) -> float:
        """Total tokens over optim.tokens_base."""
        total = self.steps * self.tokens_per_step
        return total / (self.optim.tokens_base or total)

    def with_compute(self, dtype: Float) -> "Config":
        """This config with precision.compute = auto filled in."""
        compute = dtype if self.precision.compute == "auto" else self.precision.compute
        return dataclasses.replace(self, precision=dataclasses.replace(self.precision, compute=compute))

    def with_vocab(self, n_vocab: int) -> "Config":
        """This config with the tokenizer's size filled in. Raises ConfigError if model.n_vocab is set to less."""
        own = self.model.n_vocab
        too_small = f"model.n_vocab = {own}: the tokenizer gives ids up to {n_vocab - 1}; set {n_vocab}, or leave it out"
        check(own is None or own >= n_vocab, too_small)
        return dataclasses.replace(self, model=dataclasses.replace(self.model, n_vocab=own or n_vocab))


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting and group of settings by its dotted key, in the order of the schema."""
    return {one.key: one for one in settings_of(Config)}


def may_change_on_resume(key: str) -> bool:
    """Whether a setting may differ from the checkpoint's when a run resumes, changing neither the weights' meaning nor the data.

    The settings of text and tokenizer are free here because the checkpoint's fingerprints compare those.
    """
    while key not in all_settings() and "." in key:  # an entry of a dict is as free as the dict
        key = key.rpartition(".")[0]
    return key in all_settings() and all_settings()[key].free


def flatten(nested: Config | dict[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted key, to store and compare: secrets are redacted. An empty dictionary stays a value."""
    flat: dict[str, Any] = {}
    for key, value in redact(nested if isinstance(nested, dict) else dataclasses.asdict(nested)).items():
        below = flatten(value) if isinstance(value, dict) else {}
        flat |= {f"{key}.{k}": v for k, v in below.items()} or {key: value}
    return flat


def non_defaults(config: Config) -> dict[str, object]:
    """The settings whose values are not the defaults, by dotted key."""
    defaults = flatten(Config())
    return {key: value for key, value in flatten(config).items() if value != defaults[key]}
