"""Memory, bounds and the cost of a run by arithmetic on what the trace counts: an answer at once, and optimistic."""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
from jax.sharding import NamedSharding

from mutransformer.model.transformer import flops_per_token, specs
from mutransformer.planning import trace
from mutransformer.planning.case import Case
from mutransformer.planning.chips import Topology
from mutransformer.planning.kernels import Kernels
from mutransformer.planning.timing import HBM_EFFICIENCY
from mutransformer.training.state import plan

# For `guess` alone, which ranks meshes and policies: set between the compiled steps, with and without the compiler's flags, of a
# 1.3 B model on 64 v5p chips.
MXU_EFFICIENCY = 0.75
EXPOSED = 0.75

# What moves, by kind and axis of the mesh.
_PURPOSE = {
    ("all-gather", "x"): "weights",
    ("reduce-scatter", "x"): "gradients",
    ("all-reduce", "x"): "gradients, loss",
    ("all-gather", "y"): "activations",
    ("reduce-scatter", "y"): "activations",
    ("collective-permute", "y"): "activations",
    ("all-reduce", "y"): "norms, softmax",
}


@dataclass(frozen=True)
class Traffic:
    """A kind of collective in a step, on one device.

    Attributes:
        count: of them.
        bytes: of the whole arrays.
        wire: that leave a device.
        seconds: at least.
    """

    purpose: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    wire: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    parameters: in all.
    memory: bytes on a device: parameters, optimizer, batch; kept: activations for the backward pass and gradients; working: the
        layer in work.
    flops: a device's, in a step: by convention, of matrix products, of Pallas kernels.
    hbm_bytes: moved on a device in a step, if whatever is not a matrix product is fused into one.
    traffic: collectives.
    bounds: seconds that a step takes at least, by what bounds it; for ICI by axis of the mesh.
    guess: seconds of a step, with usual losses: to compare settings, no more.
    unknown: Pallas kernels that count for nothing.
    """

    case: Case
    parameters: int
    memory: dict[str, float]
    flops: dict[str, float]
    hbm_bytes: float
    traffic: list[Traffic]
    bounds: dict[str, float]
    guess: float
    unknown: list[str]

    @property
    def peak(self) -> float:
        """Bytes on a device at most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.case.topology.chip.hbm_bytes

    @property
    def bound(self) -> str:
        """What bounds the step."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return self.bounds[self.bound]

    @property
    def mfu(self) -> float:
        """Of a step at the bound."""
        return self.flops["model"] / (self.seconds * self.case.topology.chip.peak_flops)

    def run(self, seconds: float) -> dict[str, float]:
        """The whole run, with steps of so many seconds."""
        c = self.case.config
        tokens, total = float(c.tokens_per_step * c.steps), seconds * c.steps
        return {
            "tokens": tokens,
            "tokens_per_parameter": tokens / self.parameters,
            "days": total / 86400,
            "chip_hours": total / 3600 * self.case.topology.size,
        }


def estimate(case: Case, kernels: Kernels) -> Estimate:
    """Of a case, from its trace."""
    c, chip, n = case.config, case.topology.chip, case.topology.size
    done = trace.work(c, case.mesh, kernels)
    memory = held(case)
    state = memory["parameters"] + memory["optimizer"]
    # The update reads gradients twice, for their norm and for itself, and the state; it writes the state.
    hbm_bytes = done.hbm_bytes + 2 * memory["parameters"] + 2 * state
    memory |= {"kept": done.kept_bytes, "working": done.working_bytes}
    tokens = c.tokens_per_step / n
    flops = {"model": flops_per_token(c) * tokens, "matmul": done.flops, "kernel": done.kernel_flops}
    traffic = _traffic(case, done)
    bounds = {
        "MXU": (done.flops + done.kernel_flops / kernels.efficiency) / chip.peak_flops,
        "HBM": hbm_bytes / chip.hbm_bandwidth,
    }
    for axis in case.sizes:
        if seconds := sum(each.seconds for each in traffic if axis in each.axes):
            bounds[f"ICI {axis}"] = seconds
    mxu = (done.flops / MXU_EFFICIENCY + done.kernel_flops / kernels.efficiency) / chip.peak_flops
    guess = max(mxu, bounds["HBM"] / HBM_EFFICIENCY) + EXPOSED * sum(each.seconds for each in traffic)
    parameters = sum(w.size for w in jax.tree.leaves(specs(c)))
    return Estimate(case, parameters, memory, flops, hbm_bytes, traffic, bounds, guess, sorted(done.unknown))


def held(case: Case) -> dict[str, float]:
    """Bytes on a device of what a step is given: parameters, the optimizer's state, the batch."""
    state = plan(case.config, case.mesh).shapes
    batch = jax.tree.leaves(trace.abstract_batch(case.config))
    return {
        "parameters": _bytes(state.params),
        "optimizer": _bytes((state.opt, state.step)),
        "batch": float(sum(math.prod(a.shape) * a.dtype.itemsize for a in batch)) / case.sizes["x"],
    }


def _bytes(tree: Any) -> float:
    total = 0.0
    for a in jax.tree.leaves(tree):
        assert isinstance(a.sharding, NamedSharding)
        total += math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    return total


def _traffic(case: Case, done: trace.Work) -> list[Traffic]:
    found = []
    for move, count in done.count.items():
        kind, axes = move.kind, tuple(axis for axis in move.axes if case.sizes[axis] > 1)
        n = math.prod(case.sizes[axis] for axis in axes)
        if n == 1:
            continue
        bytes_ = float(done.bytes[move])
        share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
        bandwidth = case.topology.chip.ici_bandwidth * torus_axes(case.topology, case.sizes, axes)
        purpose = _PURPOSE.get((kind, "".join(axes)), "other")
        found.append(Traffic(purpose, kind, axes, count, bytes_, bytes_ * share, bytes_ * share / bandwidth))
    return sorted(found, key=lambda each: -each.seconds)


def torus_axes(topology: Topology, sizes: dict[str, int], axes: tuple[str, ...]) -> float:
    """How many rings of the torus can serve a collective over axes of the mesh at once; a line, or a part of a ring, counts half.

    The axes of the mesh are laid on whole axes of the torus as far as their sizes allow it, the last axis of the mesh first.
    """
    free = dict(enumerate(topology.shape))
    total = 0.0
    for axis in reversed(sizes):
        chosen = _whole(free, sizes[axis])
        covered = math.prod(free.pop(place) for place in chosen)
        if axis in axes:
            total += sum(1.0 if topology.wraps[place] else 0.5 for place in chosen)
            total += 0.5 if covered < sizes[axis] else 0.0
    return total


def _whole(free: dict[int, int], size: int) -> tuple[int, ...]:
    """The places, of more than one chip, that together cover most of a size and divide it; the fewest of those that do."""
    places = [place for place, n in free.items() if n > 1]
    fitting = [
        chosen
        for count in range(len(places) + 1)
        for chosen in combinations(places, count)
        if size % math.prod(free[place] for place in chosen) == 0
    ]
    return max(fitting, key=lambda chosen: math.prod(free[place] for place in chosen))
