"""The kernels compute what the plain form does: output and every gradient, on one device and spread over a mesh.

Splash attention is interpreted here. cuDNN's has to be taken at its arguments, but for the test that wants a GPU.
"""

import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_unless
from programs import program
from test_attention import HEADS, value_and_grads, whole_attention
from test_ops import EPS, close, distance, f32, normal
from test_sharding import TINY, params, worst

from mutransformer.config.load import load
from mutransformer.data.batches.pipeline import Batch
from mutransformer.errors import ConfigError
from mutransformer.model.attention import attention
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.training.step import make_loss_and_grads

T, D, SCALE = 256, 64, 0.03
BORDERS = np.zeros((2, T), np.int32)
BORDERS[0, [3, 4, 128]] = BORDERS[1, [100, 255]] = 1
SEGMENTS = jnp.cumsum(jnp.asarray(BORDERS), 1)


def attend(kernel: Any, segments: Any) -> Any:
    return partial(attention, scale=SCALE, activation="softmax", eps=EPS, segments=segments, implementation=kernel)


def inputs(heads: str, dtype: Any = jnp.float32) -> tuple[tuple[jax.Array, ...], jax.Array]:
    h, n_kv = HEADS[heads]
    args = tuple(3 * f32(normal(i, 2, T, n, D)) for i, n in enumerate((h, n_kv, n_kv)))
    return tuple(a.astype(dtype) for a in args), f32(normal(3, 2, T, h, D))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutransformer.model.attention.BLOCK", 128)  # four, of which one is masked whole


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("heads", "apart"), slow_unless([("GQA", True)], [("MHA", False), ("GQA", True), ("MQA", True)]))
def test_splash_attention_is_the_plain_form(heads: str, apart: bool) -> None:
    args, by = inputs(heads)
    segments = SEGMENTS if apart else None
    ours, theirs = (
        jax.jit(value_and_grads(attend(kernel, segments), by))(*args) for kernel in ("splash_interpreted", "blockwise")
    )
    assert close(ours, theirs, 1e-5)
    others = [{"causal": False, "segments": segments}, {"segments": None if apart else SEGMENTS}]
    for other in others:
        wrong = jax.jit(value_and_grads(partial(whole_attention, scale=SCALE, **other), by))(*args)
        assert all(distance(a, b) > 0.01 for a, b in zip(ours, wrong, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_splash_attention_in_bfloat16() -> None:
    args, by = inputs("GQA", jnp.bfloat16)
    ours = jax.jit(value_and_grads(attend("splash_interpreted", SEGMENTS), by))(*args)
    exact = jax.jit(value_and_grads(attend("blockwise", SEGMENTS), by))(*(a.astype(jnp.float32) for a in args))
    assert all(a.dtype == jnp.bfloat16 for a in ours)
    assert close(ours, exact, 0.02)  # a few roundings of 2^-9 each


def forwards(jaxpr: Any) -> int:
    """How many of its equations are splash attention's forward pass."""
    n = 0
    for equation in jaxpr.eqns:
        n += equation.params.get("name") == "splash_mha_fwd_residuals" and equation.primitive.name == "pallas_call"
        inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
        n += sum(forwards(value) for value in inner if hasattr(value, "eqns"))
    return n


def test_it_keeps_what_its_backward_pass_needs() -> None:
    """The forward pass is not run again: not without rematerialisation, nor if what is kept is chosen by name."""
    args, by = inputs("MHA")
    by_name = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attended"))

    def runs(remat: Any) -> int:
        f = remat(attend("splash_interpreted", None))
        return forwards(jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(f(*args) * by), (0, 1, 2)))(*args).jaxpr)

    assert runs(lambda f: f) == runs(by_name) == 1
    assert runs(jax.checkpoint) == 2


MODEL = [*TINY, "model.d_model=128", "model.d_head=64", "data.seq_len=128", "model.n_layer=1"]
CASES = {"heads": [], "one for keys, rematerialised": ["model.n_kv_head=1", "model.remat=full", "model.qk_scale=0.3"]}


@cache
def loss_and_grads(case: str, kernel: str, x: int, y: int, apart: bool = True) -> tuple[Any, Any]:
    config = load([*MODEL, *CASES[case], f"mesh.x={x}", f"mesh.y={y}", f"model.attention_kernel={kernel}"])
    mesh = make_mesh(config.mesh, jax.devices()[: x * y])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, (8, 128), dtype=np.int32)
    segments = np.cumsum(rng.random(tokens.shape) < 0.05, axis=1, dtype=np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, np.bool_), segments if apart else None)
    return jax.device_get(jax.jit(make_loss_and_grads(program(config, mesh, bos_id=1)))(params(config), put_batch(batch, mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["heads", "one for keys, rematerialised"])
def test_loss_and_every_gradient_on_a_mesh_are_those_of_the_plain_form_on_one_device(case: str) -> None:
    metrics, grads = loss_and_grads(case, "splash", 4, 2)
    want, want_grads = loss_and_grads(case, "xla", 1, 1)
    assert metrics["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert worst(grads, want_grads) <= 1e-5
    joined, joined_grads = loss_and_grads(case, "splash", 4, 2, apart=False)
    assert joined["loss"] != pytest.approx(want["loss"], rel=1e-4) and worst(joined_grads, want_grads) > 1e-3


@pytest.mark.parametrize(("heads", "segments"), [("GQA", None), ("MHA", SEGMENTS)])
def test_cudnn_is_asked_for_the_same(heads: str, segments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches it, given to the implementation in plain XLA that takes the same arguments."""
    args, by = inputs(heads, jnp.bfloat16)
    library = jax.nn.dot_product_attention

    def plain(*args: Any, implementation: str, **kwargs: Any) -> Any:
        assert implementation == "cudnn"
        return library(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    ours = jax.jit(value_and_grads(attend("cudnn", segments), by))(*args)
    theirs = jax.jit(value_and_grads(attend("blockwise", segments), by))(*args)
    assert close(ours, theirs, 0.02)
    wrong = jax.jit(value_and_grads(attend("blockwise", SEGMENTS if segments is None else None), by))(*args)
    assert all(distance(a, b) > 0.1 for a, b in zip(ours, wrong, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["splash", "data.seq_len=100"], "splash: needs a multiple of 128 positions, not data.seq_len = 100"),
        (["splash", "model.d_head=32"], "splash: needs heads of a multiple of 64, not model.d_head = 32"),
        (["splash", "model.attention_activation=elu"], "splash: computes softmax only, not model.attention_activation = elu"),
        (["cudnn", "precision.compute=float32"], "cudnn: computes in bfloat16, not precision.compute = float32"),
        (["cudnn", "model.d_head=4"], "cudnn: needs heads of a multiple of 8 up to 128, not model.d_head = 4"),
        (["cudnn", "data.seq_len=33"], "cudnn: needs an even number of positions, not data.seq_len = 33"),
    ],
)
def test_a_kernel_that_cannot_is_refused(settings: list[str], message: str) -> None:
    kernel, *others = settings
    with pytest.raises(ConfigError, match=f"^model.attention_kernel = {message}$"):
        load([f"model.attention_kernel={kernel}", *others])


ON_A_GPU = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax
from test_kernels import SEGMENTS, attend, close, inputs, value_and_grads
for heads in ("MHA", "GQA", "MQA"):
    for segments in (None, SEGMENTS):
        args, by = inputs(heads, "bfloat16")
        ours, theirs = (jax.jit(value_and_grads(attend(kernel, segments), by))(*args) for kernel in ("cudnn", "blockwise"))
        assert close(ours, theirs, 0.02), (heads, segments)
"""


@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="needs an NVIDIA GPU")
def test_cudnn_on_a_gpu() -> None:
    """In a process of its own, for this one sees no accelerators."""
    subprocess.run([sys.executable, "-c", ON_A_GPU], check=True, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, timeout=600)
