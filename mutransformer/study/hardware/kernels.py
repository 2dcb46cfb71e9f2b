"""Attention as the devices compute it, forward and backward, against the plain formula in float32."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from mutransformer.config.schema import unfit
from mutransformer.model.attention import attention
from mutransformer.model.execution import device_kernel
from mutransformer.sharding.devices import multiplies_bfloat16
from mutransformer.study.hardware.section import Result, SectionFailed, Task
from mutransformer.study.hardware.sizes import AttentionSize

# |ours - plain| / |plain|, by norm: a few roundings of the dtype. Those of tests/test_kernels.py.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
GROWTH = 3.0  # how much longer than those before it a case may take: one that would not end in time is left out
APART = 5  # times the tolerance: how far a wrong mask must be from the right one, or the comparison shows nothing
PLAIN_XLA = ("blockwise", "dense")
NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values")


class Case(NamedTuple):
    """One comparison."""

    kernel: Any  # one of model.execution.Attention
    heads: int
    kv_heads: int
    documents: bool  # a row holds several, which do not read each other

    def __str__(self) -> str:
        return f"{self.kernel}, {self.heads} heads for {self.kv_heads}{', documents apart' if self.documents else ''}"


def kernels_of(device: Any) -> list[str]:
    """The implementations of attention that a device can compute, its fastest one first; interpreted ones on a CPU."""
    if device.platform == "cpu":
        return [*PLAIN_XLA, "splash_interpreted"]
    kernel = device_kernel(device.platform, device.device_kind)
    return [kernel, *PLAIN_XLA] if kernel != "xla" else [*PLAIN_XLA]


def kernels(task: Task, size: AttentionSize) -> Iterator[Result]:
    """Compares each implementation of attention with `plain_attention`: the output and the gradients of its three arguments.

    With as many heads of keys as of queries and with fewer, of whole rows and of rows of several documents. Each case has a
    control: the plain formula with the wrong mask. Raises SectionFailed if a case is beyond its tolerance or does not tell the
    wrong mask from the right one, or if none was compared.
    """
    device = jax.devices()[0]
    dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    result: Result = {**size._asdict(), "dtype": dtype, "tolerance": TOLERANCE[dtype], "cases": [], "left_out": []}
    wrong: list[str] = []
    longest = 0.0
    expected = {(kv, apart): _Expected(size, kv, apart, dtype) for kv in size.kv_heads for apart in (False, True)}
    for kernel in kernels_of(device):
        name: Any = "xla" if kernel in PLAIN_XLA else kernel.removesuffix("_interpreted")
        why = unfit(name, "softmax", size.positions, size.d_head, dtype)
        if why is not None:
            result["left_out"].append(f"{kernel}: {why}")
            continue
        for (n_kv, apart), plain in expected.items():
            case, began = Case(kernel, size.heads, n_kv, apart), time.monotonic()
            if why := task.too_late_for(GROWTH * longest, f"the longest case took {longest:.0f} s"):
                result["left_out"].append(f"{case}: {why}")
                yield result
                continue
            found = compare(case, plain)
            longest = max(longest, time.monotonic() - began)
            result["cases"].append({**case._asdict(), **found})
            task.say(f"{case}: off by {found['distance']:.1e}, a wrong mask by {found['control']:.1e}")
            if not found["distance"] <= TOLERANCE[dtype]:
                wrong.append(f"{case}: the {found['worst']} is off by {found['distance']:.2g}, more than {TOLERANCE[dtype]:g}")
            if not found["control"] >= APART * TOLERANCE[dtype]:
                wrong.append(f"{case}: a wrong mask is off by only {found['control']:.2g}")
            yield result
    if wrong or not result["cases"]:
        raise SectionFailed("; ".join(wrong) or "no kernel was compared")


class _Expected:
    """Arguments of a case, and what the plain formula makes of them with the right mask and with a wrong one."""

    def __init__(self, size: AttentionSize, n_kv: int, apart: bool, dtype: str) -> None:
        shape = (size.rows, size.positions)
        self.scale = 0.3 / size.d_head**0.5
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (size.heads, n_kv, n_kv)
        # Logits of about 3: weights that are neither uniform nor one that takes all.
        self.args = [3 * jax.random.normal(key, (*shape, n, size.d_head)) for key, n in zip(keys, heads, strict=False)]
        self.args = [a.astype(dtype) for a in self.args]
        self.by = jax.random.normal(keys[3], (*shape, size.heads, size.d_head)).astype(dtype).astype(jnp.float32)
        borders = np.zeros(shape, np.int32)
        borders[:, :: max(3, size.positions // 5)] = 1
        documents = jnp.cumsum(jnp.asarray(borders), axis=1)
        self.segments = documents if apart else None
        exact = [a.astype(jnp.float32) for a in self.args]
        self.right, self.wrong = (
            value_and_grads(partial(plain_attention, scale=self.scale, segments=segments), self.by)(*exact)
            for segments in ((documents, None) if apart else (None, documents))
        )


def compare(case: Case, expected: _Expected) -> Result:
    """distance: the largest of the four relative distances; worst: which it is of; control: the smallest from a wrong mask's."""
    attend = partial(
        attention,
        scale=expected.scale,
        activation="softmax",
        eps=0.0,
        segments=expected.segments,
        implementation=case.kernel,
    )
    ours = value_and_grads(attend, expected.by)(*expected.args)
    distances = [distance(a, b) for a, b in zip(ours, expected.right, strict=True)]
    at = int(np.argmax([np.inf if np.isnan(d) else d for d in distances]))
    control = min(distance(a, b) for a, b in zip(ours, expected.wrong, strict=True))
    return {"distance": distances[at], "worst": NAMES[at], "control": control}


def value_and_grads(attend: Callable[..., Array], by: Float[Array, "b T h D"]) -> Callable[..., tuple[Array, ...]]:
    """A jitted function of (q, k, v) -> attend(q, k, v), and the gradients of its sum weighted by an array."""

    def both(*args: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(attend, *args)
        return out, *pull(by.astype(out.dtype))

    return jax.jit(both)


def plain_attention(
    q: Float[Array, "b T h D"],
    k: Float[Array, "b T k D"],
    v: Float[Array, "b T k D"],
    scale: float,
    segments: Int[Array, "b T"] | None,
) -> Float[Array, "b T h D"]:
    """Causal softmax attention by its definition, with the whole T x T matrix of weights and products of full float32."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
    readable: Bool[Array, "..."] = jnp.tril(jnp.ones((T, T), bool))[None, None]
    if segments is not None:
        readable &= (segments[:, :, None] == segments[:, None, :])[:, None]
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    weights = jax.nn.softmax(jnp.where(readable, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")


def distance(ours: Array, plain: Array) -> float:
    """|ours - plain| / |plain| by norm, in float64."""
    a, b = (np.asarray(x, np.float64) for x in (ours, plain))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
