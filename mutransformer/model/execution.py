"""How a step is executed: every setting that trades speed against memory, resolved once for the devices of a mesh.

None of them changes what is computed. What the config leaves open is decided here. Gains are seconds of a simulated step: 1.3 G
parameters, 2^20 tokens in rows of 256, 64 chips of TPU v5p; results/scale has all of them, and how they were found.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax

from mutransformer.config.schema import AttentionKernel, Config, unfit
from mutransformer.errors import check
from mutransformer.sharding.devices import BEFORE_AMPERE, multiplies_bfloat16, quick_compilation
from mutransformer.sharding.mesh import AnyMesh, first_device

# blockwise: softmax over blocks of queries, in XLA; dense: all logits at once, in XLA, which XLA:TPU fuses with their softmax.
Attention = Literal["splash", "splash_interpreted", "cudnn", "dense", "blockwise"]

# The values that a layer keeps for its backward pass by name, besides its input; the rest is recomputed. "attended" is all that
# attention's gradient needs of its result. At 64 x 1: attention 0.427 and 13.3 GB a chip, dots 0.381 and 19.3 GB.
SAVED_NAMES = {
    "full": (),
    "outputs": ("attended", "middle"),  # recomputes only the products that lead to attention and to the activation
    "attention": ("query", "key", "value", "attended", "middle"),
    "dots": ("query", "key", "value", "attended", "middle", "hidden", "gate"),  # recomputes no product with a weight
}
SPLASH_FROM = 512  # the shortest row for which auto selects splash attention: a shorter row's logits are cheap to write out
_WITHOUT_CUDNN = re.compile(f"AMD|{BEFORE_AMPERE}", re.IGNORECASE)  # GPUs without its attention kernel
HEAD_CHUNK_CPU = 512  # tokens; tuned on two cores
CACHE_LENGTHS_CPU = 4  # a GPU would stop for each choice, and reads its memory fast
UNROLLED_LAYERS_CPU = 12  # at most; with 32 the step takes 10 s longer to compile and is no faster
UNROLLED_LAYERS_GPU = 72  # at most; 72 take 40 to 55 s longer to compile, and more were not tried
MICROBATCH_TOKENS_CPU = 1024  # at least; fewer are no faster
HEAD_BYTES = 512 << 20  # of float32 logits: the sum of the unembedding's gradient, of like size, is read and written per chunk


class Tuning(NamedTuple):
    """Choices for a kind of device.

    The options are XLA's, by name. They are passed to the compilation of the step alone, not through XLA_FLAGS or
    LIBTPU_INIT_ARGS, where an option of another device's compiler ends the process.
    """

    options: Mapping[str, str]
    via_all_to_all: bool  # for sums over y (collectives.scatter_y)


# Weights are gathered while matrix products run. An all-gather is not turned into an all-reduce of padded shards, which cannot
# overlap with computation.
_ASYNC_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
_ASYNC_ALL_TO_ALL = {"xla_tpu_enable_async_all_to_all": "true"}
# Vector memory that a fusion may use, in KiB: larger tiles of matrix products. A v5p core has 64 MiB; the default is 16 MiB.
_LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": "57344"}

TUNING = {
    r"TPU v5p?": Tuning({**_ASYNC_GATHERS, **_ASYNC_ALL_TO_ALL, **_LARGE_TILES}, via_all_to_all=True),
    r"TPU v4": Tuning({**_ASYNC_GATHERS, **_ASYNC_ALL_TO_ALL}, via_all_to_all=True),
    # Nothing that changes the schedule of several GPUs is set: what was tried by compiling gains less than 5 %, and none of it
    # has run there (results/scale_gpu). What is set is for determinism:
    # Without it two runs differ from the first step on: kernels are chosen by timing them, and some sum in any order. It costs
    # 10 %: 0.286 -> 0.315 s a step, 1.3 G parameters, 8 rows of 2048 positions, remat dots, one H200, JAX 0.11.2.
    r"(NVIDIA|Tesla) .*": Tuning({"xla_gpu_deterministic_ops": "True"}, via_all_to_all=False),
    # Slices of these chips are no tori: "Async all-to-all not supported on limited ICI".
    r"TPU v5( ?lite|e)": Tuning({**_ASYNC_GATHERS, **_LARGE_TILES}, via_all_to_all=False),
    r"TPU v6( ?lite|e)": Tuning(_ASYNC_GATHERS, via_all_to_all=False),
    r".*": Tuning({}, via_all_to_all=False),
}


@dataclass(frozen=True)
class Execution:
    """The resolved settings of a step."""

    platform: str  # of the devices, as JAX names it; device_kind likewise
    device_kind: str
    attention: Attention
    remat: str  # what a layer recomputes in the backward pass: none, or a key of SAVED_NAMES
    head_chunk: int  # tokens of a device whose logits exist at a time
    microbatches: int  # of a batch, computed one after another
    unroll_layers: bool  # one after another in the program, instead of in a loop
    overlap_groups: int  # groups of a device's rows; one computes while another communicates over y
    via_all_to_all: bool  # for sums over y
    cache_lengths: int  # different parts of a KV cache, from its beginning, that decoding can choose to read
    compiler_options: Mapping[str, str]  # of the step, for XLA, by name
    other_options: Mapping[str, str]  # likewise, of evaluation, decoding and initial values

    def rematerialize(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """The layer with remat applied."""
        if self.remat == "none":
            return layer
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[self.remat])
        # In a loop XLA cannot replace what is recomputed by what the forward pass computed; in a straight program it would.
        return jax.checkpoint(layer, prevent_cse=self.unroll_layers, policy=policy)


def device_kernel(platform: str, kind: str) -> AttentionKernel:
    """The fastest attention kernel of a device, by jax.Device's platform and device_kind."""
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform in ("gpu", "cuda") and not _WITHOUT_CUDNN.search(kind) else "xla"


def with_compute(config: Config, device: Any) -> Config:
    """The config with precision.compute resolved for a device, or an abstract device."""
    return config.with_compute("bfloat16" if multiplies_bfloat16(device) else "float32")


def tuning(device_kind: str) -> Tuning:
    """The choices for a kind of device as JAX names it; none if the kind is unknown, as for a CPU."""
    return next(t for pattern, t in TUNING.items() if re.fullmatch(pattern, device_kind, re.IGNORECASE))


def resolve(config: Config, mesh: AnyMesh) -> Execution:
    """The settings of a step on the devices of a mesh. Raises ConfigError if they lack model.attention_kernel."""
    device, m, y = first_device(mesh), config.model, mesh.shape["y"]
    tuned = tuning(device.device_kind)
    # Two groups with y > 1 (0.638 -> 0.535 at 16 x 4; results/scale_gpu: 3.049 -> 2.839 on 2 x 4 H100), but only where the
    # backward pass recomputes layers: without, each group would gather the layer's weights again there.
    groups = config.mesh.overlap_groups or (2 if y > 1 and m.remat != "none" else 1)
    via_all_to_all = config.mesh.reduce_scatter_via_all_to_all  # 0.572 -> 0.535 at 16 x 4
    quick = quick_compilation(device.platform) if config.xla_tuned else {}
    options = {**quick, **(tuned.options if config.xla_tuned else {})}
    return Execution(
        platform=device.platform,
        device_kind=device.device_kind,
        attention=_attention(config, device.platform, device.device_kind),
        remat=m.remat,
        head_chunk=m.head_chunk or _head_chunk(device.platform, m.padded_vocab // y),
        microbatches=config.optim.grad_accumulation_steps or _microbatches(config, device.platform, mesh),
        unroll_layers=_unroll_layers(config, device.platform, mesh) if m.unroll_layers is None else m.unroll_layers,
        overlap_groups=groups,
        via_all_to_all=tuned.via_all_to_all if via_all_to_all is None else via_all_to_all,
        cache_lengths=CACHE_LENGTHS_CPU if device.platform == "cpu" else 1,
        compiler_options={**options, **{k: _option(v) for k, v in config.xla.items()}},
        other_options=quick,
    )


def _option(value: str) -> str:
    """An XLA option as typed, except true and false, which XLA:GPU takes with a capital only."""
    return value.title() if value.lower() in ("true", "false") else value


def _attention(config: Config, platform: str, kind: str) -> Attention:
    m, T = config.model, config.data.seq_len
    available = device_kernel(platform, kind)
    kernel = m.attention_kernel
    runs = kernel in ("auto", "xla", available) or (kernel == "splash" and platform == "cpu")
    check(runs, f"model.attention_kernel = {kernel}: not on {kind}; use auto or {available}")
    if kernel == "auto":
        kernel = available
        # cuDNN is the faster one with segments too, though it takes them as a T x T mask: 0.306 s a step, XLA's 0.367 (as above:
        # one H200, 2048 positions).
        short = kernel == "splash" and T < SPLASH_FROM
        if short or unfit(kernel, m.attention_activation, T, m.d_head, config.precision.compute):
            kernel = "xla"
    if kernel == "splash":
        return "splash_interpreted" if platform == "cpu" else "splash"  # interpreted on a CPU: slow, for tests
    if kernel == "cudnn":
        return "cudnn"
    return "dense" if platform == "tpu" else "blockwise"


def _unroll_layers(config: Config, platform: str, mesh: AnyMesh) -> bool:
    """Whether to unroll the loop over layers, which copies activations into and out of stacks.

    A loop limits what is alive at a time: with remat, to the recomputed activations of one layer; on several devices, to its
    gathered weights. XLA:GPU keeps such limits without a loop as well, except with full remat on several GPUs (22 instead of
    10 GB, and no faster) and with activations gathered over y (55 instead of 39 GB). XLA:TPU takes five times as long to compile.
    Gains were measured on a CPU, and simulated for GPUs (results/scale_gpu).
    """
    m = config.model
    if platform == "cpu":
        return mesh.size == 1 and m.remat == "none" and m.n_layer <= UNROLLED_LAYERS_CPU
    keeps_limits = mesh.shape["y"] == 1 and m.remat != "full"
    return platform in ("gpu", "cuda") and keeps_limits and m.n_layer <= UNROLLED_LAYERS_GPU


def _microbatches(config: Config, platform: str, mesh: AnyMesh) -> int:
    """How many microbatches a batch has by default: a power of two that divides the rows.

    Activations of few tokens stay in the caches of a CPU: at width 128 its step takes 0.90 of the CPU time with 1024 tokens at a
    time instead of 4096, and at width 256 0.86 (docs/performance.md). With remat, memory matters more than time: gradients that
    are summed over microbatches exist twice.
    """
    n, d = 1, config.data
    if platform != "cpu" or mesh.size > 1 or config.model.remat != "none":
        return n
    groups = config.mesh.overlap_groups or 1
    while d.batch_size % (2 * n * groups) == 0 and d.batch_size // (2 * n) * d.seq_len >= MICROBATCH_TOKENS_CPU:
        n *= 2
    return n


def _head_chunk(platform: str, n_logits: int) -> int:
    """Tokens whose logits exist at a time; n_logits: logits of a token on one device."""
    if platform == "cpu":
        return HEAD_CHUNK_CPU
    fit = HEAD_BYTES // (4 * n_logits)
    return max(1, 1 << (fit.bit_length() - 1))  # a power of two, which divides the usual numbers of tokens
