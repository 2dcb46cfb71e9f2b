"""The settings of a step follow from config and devices, and its compiler options reach the compiler that they are for."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from programs import program

from mutransformer.config.load import load
from mutransformer.data.batches.rows import Batch
from mutransformer.errors import ConfigError
from mutransformer.generation.decoding import Decoder, Request
from mutransformer.generation.sampling import Sampling
from mutransformer.model.execution import Execution, device_kernel, resolve, tuning, with_compute
from mutransformer.sharding.devices import multiplies_bfloat16
from mutransformer.training.step import make_eval_step, make_train_step

TINY = ["model.d_model=32", "model.d_head=16", "model.n_layer=1", "model.n_vocab=128", "data.seq_len=8", "data.batch_size=8"]
TPU, GPU, CPU = ("tpu", "TPU v5"), ("gpu", "NVIDIA H100 80GB HBM3"), ("cpu", "cpu")


def resolved(device: tuple[str, str], *args: str, devices: int = 8, y: int = 1) -> Execution:
    platform, kind = device
    abstract = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((devices // y, y), ("x", "y"), (AxisType.Auto,) * 2, abstract_device=abstract)
    return resolve(load(["model.n_vocab=32000", *args]), mesh)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5p", "TPU v5 lite", "TPU v4", "TPU v6 lite"])
def test_options_of_a_tpu(kind: str) -> None:
    torus = kind in ("TPU v5", "TPU v5p", "TPU v4")
    execution = resolved(("tpu", kind))
    assert execution.compiler_options["xla_tpu_enable_async_collective_fusion"] == "true"
    assert ("xla_tpu_enable_async_all_to_all" in execution.compiler_options) == execution.via_all_to_all == torus
    assert tuning(kind).via_all_to_all == torus
    assert resolved(("tpu", kind), "xla_tuned=false").compiler_options == {}


def test_a_gpu_computes_deterministically_unless_told_otherwise() -> None:
    """The option, as it is written here, is one that XLA takes: it parses options of all devices alike."""
    options = dict(resolved(GPU).compiler_options)
    assert options == {"xla_gpu_deterministic_ops": "True"}
    assert jax.jit(lambda: jnp.ones(()), compiler_options=options)() == 1
    assert resolved(GPU, "xla.xla_gpu_deterministic_ops=false").compiler_options == {"xla_gpu_deterministic_ops": "False"}
    assert resolved(GPU, "xla_tuned=false").compiler_options == {}


@pytest.mark.parametrize("device", [("gpu", "AMD Instinct MI300X"), ("tpu", "TPU v99")])
def test_an_unknown_device_has_no_options(device: tuple[str, str]) -> None:
    assert resolved(device).compiler_options == {} and not resolved(device).via_all_to_all


def test_a_cpu_compiles_quickly_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    level = "xla_backend_optimization_level"
    monkeypatch.delenv("XLA_FLAGS")
    assert resolved(CPU).compiler_options == resolved(CPU).other_options == {level: "1"}
    assert resolved(CPU, "xla_tuned=false").compiler_options == resolved(CPU, "xla_tuned=false").other_options == {}
    assert resolved(CPU, f"xla.{level}=2").compiler_options == {level: "2"}
    assert level not in resolved(GPU).compiler_options and resolved(GPU).other_options == resolved(TPU).other_options == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert resolved(CPU).compiler_options == {level: "1"}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=2 --{level}=3")
    assert resolved(CPU).compiler_options == resolved(CPU).other_options == {}, "the user's level is overridden"
    assert resolved(CPU, f"xla.{level}=2").compiler_options == {level: "2"}


@pytest.mark.parametrize("what", ["initial values", "evaluation", "decoding"])
def test_options_reach_what_is_not_the_step(what: str) -> None:
    """An option that XLA does not know is refused there, and not by the step."""
    built = program(load([*TINY, "mesh.x=1"]), jax.devices()[:1])
    refuses = replace(built.forward.execution, other_options={"xla_of_nothing": "true"})
    built = replace(built, forward=replace(built.forward, execution=refuses))
    batch = Batch(jax.ShapeDtypeStruct((8, 8), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.bool_))
    make_train_step(built).lower(built.state, batch)
    weights: Any = built.state.params
    evaluation: Any = make_eval_step(built)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_nothing"):
        if what == "initial values":
            built.init_state()
        elif what == "evaluation":
            evaluation.lower(weights, batch).compile()
        else:
            next(Decoder(built, Sampling(), [Request((1,), 0, 4)]).decode(weights))


def test_only_a_cpu_chooses_how_much_of_a_cache_it_reads() -> None:
    assert resolved(CPU).cache_lengths > 1 and resolved(GPU).cache_lengths == resolved(TPU).cache_lengths == 1


def test_options_of_the_config_come_last() -> None:
    own = ["xla.xla_tpu_scoped_vmem_limit_kib=32768", "xla.xla_tpu_overlap_compute_collective_tc=false", "xla.new=7"]
    options = resolved(TPU, *own).compiler_options
    assert options["xla_tpu_scoped_vmem_limit_kib"] == "32768" and options["new"] == "7"
    assert options["xla_tpu_overlap_compute_collective_tc"] == "False"
    assert options["xla_enable_async_all_gather"] == "true"


def test_options_reach_the_compiler() -> None:
    """A CPU's compiler takes an option of its own, and refuses one that it does not know."""

    def compiled(*options: str) -> object:
        built = program(load([*TINY, *options]))
        batch = Batch(jax.ShapeDtypeStruct((8, 8), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.bool_))
        return make_train_step(built).lower(built.state, batch).compile()

    compiled("xla.xla_cpu_enable_fast_math=false")
    with pytest.raises(ConfigError, match="^xla: .*xla_of_nothing"):
        compiled("xla.xla_of_nothing=true")


@pytest.mark.parametrize(("device", "dtype"), [(TPU, "bfloat16"), (GPU, "bfloat16"), (("gpu", "Tesla T4"), "float32")])
def test_the_compute_dtype_is_what_the_device_multiplies(device: tuple[str, str], dtype: str) -> None:
    kind = AbstractDevice(device_kind=device[1], num_cores=1, platform=device[0])
    assert with_compute(load([]), kind).precision.compute == dtype
    for given in ("float32", "bfloat16"):
        assert with_compute(load([f"precision.compute={given}"]), kind).precision.compute == given


def test_a_program_has_the_dtype_that_it_computes_in() -> None:
    """A run's config.yaml and checkpoints come from the program's config: with another dtype the run is not resumed."""
    built = program(load(TINY))
    assert built.config.precision.compute == ("bfloat16" if multiplies_bfloat16(jax.devices()[0]) else "float32")
    assert built.forward.policy.compute == built.config.precision.compute and "compute auto" not in str(built)


def test_overlap_groups() -> None:
    remat = "model.remat=dots"
    assert [resolved(TPU, remat, y=y).overlap_groups for y in (1, 2, 4)] == [1, 2, 2]
    assert resolved(TPU, y=2).overlap_groups == 1  # each group would gather the weights again in the backward pass
    assert resolved(TPU, remat, "mesh.overlap_groups=1", y=2).overlap_groups == 1


def test_sums_over_y_by_an_all_to_all() -> None:
    key = "mesh.reduce_scatter_via_all_to_all"
    assert [resolved(TPU, f"{key}={value}").via_all_to_all for value in ("null", "true", "false")] == [True, True, False]
    assert resolved(CPU, f"{key}=true").via_all_to_all


def test_layers_are_unrolled_on_one_cpu_device() -> None:
    def unrolled(*args: str, device: tuple[str, str] = CPU, devices: int = 1) -> bool:
        return resolved(device, *args, devices=devices).unroll_layers

    assert unrolled("model.n_layer=12") and unrolled("model.n_layer=13", "model.unroll_layers=true")
    assert not any((unrolled("model.n_layer=13"), unrolled("model.remat=dots"), unrolled("model.unroll_layers=false")))
    assert not any((unrolled(devices=2), unrolled(device=TPU)))


def test_a_cpu_device_computes_1024_tokens_at_a_time() -> None:
    """Unless told otherwise, or memory matters more."""

    def microbatches(rows: int, length: int, *args: str, device: tuple[str, str] = CPU, devices: int = 1) -> int:
        return resolved(device, f"data.batch_size={rows}", f"data.seq_len={length}", *args, devices=devices).microbatches

    sizes = {(16, 256): 4, (16, 128): 2, (16, 64): 1, (15, 256): 1, (12, 256): 2, (24, 128): 2, (4, 2048): 4, (1, 4096): 1}
    assert {size: microbatches(*size) for size in sizes} == sizes
    assert microbatches(16, 256, "optim.grad_accumulation_steps=1") == 1 == microbatches(16, 256, "model.remat=dots")
    assert microbatches(16, 256, "optim.grad_accumulation_steps=8") == 8 == microbatches(16, 256, "mesh.overlap_groups=2") * 2
    assert microbatches(6, 1024, "mesh.overlap_groups=3") == 2 and microbatches(16, 256, "mesh.overlap_groups=16") == 1
    assert microbatches(16, 256, devices=2) == microbatches(16, 256, device=GPU, devices=1) == 1


def test_the_microbatches_that_are_chosen_are_those_of_the_step() -> None:
    """A step traced with the number that is chosen is the one traced without a choice, and not the one of a whole batch."""

    def traced(*args: str) -> str:
        built = program(load([*TINY, "data.seq_len=256", "mesh.x=1", *args]), jax.devices()[:1])
        rows = jax.ShapeDtypeStruct((8, 256), jnp.int32), jax.ShapeDtypeStruct((8, 256), jnp.bool_)
        assert f"{built.execution.microbatches} microbatch(es)" in str(built)
        return make_train_step(built).lower(built.state, Batch(*rows)).as_text()

    assert traced() == traced("optim.grad_accumulation_steps=2") != traced("optim.grad_accumulation_steps=1")


def test_layers_are_unrolled_on_gpus_that_gather_no_activations() -> None:
    deepest, deeper = ([f"model.n_layer={n}", "model.remat=dots"] for n in (72, 73))
    assert resolved(GPU, *deepest).unroll_layers and not resolved(GPU, *deeper).unroll_layers
    assert resolved(GPU).unroll_layers and not resolved(GPU, y=2).unroll_layers
    assert not any(resolved(GPU, setting).unroll_layers for setting in ("model.unroll_layers=false", "model.remat=full"))


@pytest.mark.parametrize("unroll", ["false", "true"])
def test_what_remat_drops_is_computed_again(unroll: str) -> None:
    def products(*options: str) -> int:
        built = program(load([*TINY, "model.n_layer=2", f"model.unroll_layers={unroll}", "xla_tuned=false", *options]))
        batch = Batch(jax.ShapeDtypeStruct((8, 8), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.bool_))
        return len(re.findall(r"/dot_general", make_train_step(built).lower(built.state, batch).compile().as_text() or ""))

    kept, recomputed = products(), products("model.remat=full")
    assert recomputed > kept


def test_head_chunk() -> None:
    assert resolved(CPU).head_chunk == 512 and resolved(CPU, "model.head_chunk=7").head_chunk == 7
    one, two = resolved(TPU).head_chunk, resolved(TPU, y=2).head_chunk
    assert one * 4 * 32000 <= 512 << 20 < 2 * one * 4 * 32000 and two == 2 * one


@pytest.mark.parametrize(
    ("device", "positions", "head", "more", "attention"),
    [
        (TPU, 512, 128, [], "splash"),
        (TPU, 640, 64, ["data.intra_document_mask=true"], "splash"),
        (TPU, 256, 128, [], "dense"),
        (TPU, 600, 128, [], "dense"),
        (TPU, 512, 32, [], "dense"),
        (TPU, 512, 128, ["model.attention_activation=sqrelu"], "dense"),
        (TPU, 512, 128, ["model.attention_kernel=xla"], "dense"),
        (GPU, 64, 128, [], "cudnn"),
        (GPU, 64, 256, [], "blockwise"),
        (GPU, 64, 128, ["data.intra_document_mask=true"], "cudnn"),
        (GPU, 64, 128, ["precision.compute=float32"], "blockwise"),
        (CPU, 512, 128, [], "blockwise"),
        (CPU, 512, 128, ["model.attention_kernel=splash"], "splash_interpreted"),
    ],
)
def test_attention(device: tuple[str, str], positions: int, head: int, more: list[str], attention: str) -> None:
    sizes = ["model.d_model=512", f"model.d_head={head}", f"data.seq_len={positions}"]
    assert resolved(device, *sizes, *more).attention == attention


@pytest.mark.parametrize("kind", ["AMD Instinct MI300X", "Tesla V100-SXM2-16GB", "Tesla T4", "NVIDIA GeForce GTX 1080"])
def test_gpus_without_the_kernel(kind: str) -> None:
    assert device_kernel("gpu", kind) == "xla" and resolved(("gpu", kind)).attention == "blockwise"
    assert device_kernel("gpu", "NVIDIA A100-SXM4-40GB") == device_kernel("gpu", "NVIDIA L4") == "cudnn"


@pytest.mark.parametrize(("device", "other"), [(CPU, "xla"), (TPU, "splash")])
def test_a_kernel_of_another_device_is_refused(device: Any, other: str) -> None:
    message = f"^model.attention_kernel = cudnn: not on {device[1]}; use auto or {other}$"
    with pytest.raises(ConfigError, match=message):
        resolved(device, "model.attention_kernel=cudnn")
