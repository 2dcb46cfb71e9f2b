"""What is planned, a config on devices with a mesh that needs none of them, and what its step needs by the counted work.

That is memory, lower bounds of a step's time, and the cost of a run. Immediate, and optimistic.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mutransformer.config.run import MeshConfig
from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError, check
from mutransformer.planning.estimate.work import Work, abstract_batch, count_step
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.topology import HBM_EFFICIENCY, LinkUse, Topology, sent_fraction
from mutransformer.sharding.mesh import n_row_groups
from mutransformer.training.program import Program, Vocabulary, build

# Only for `guess`, which ranks meshes and remat policies. Set between simulated steps of a 1.3 B model on 64 v5p chips, with and
# without XLA's tuning flags: matrix products reach this fraction of peak, and this fraction of communication is exposed. On GPUs
# they are assumptions.
MATMUL_EFFICIENCY = 0.75
EXPOSED = 0.75

# What collectives carry, by kind and mesh axis.
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
class Scenario:
    """A program on an abstract mesh over devices."""

    program: Program
    topology: Topology

    @property
    def config(self) -> Config:
        """With mesh sizes and vocabulary filled in."""
        return self.program.config

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices along each mesh axis, in the order in which devices are numbered."""
        return dict(self.program.mesh.shape)

    @property
    def settings(self) -> str:
        """Mesh, rematerialization and accumulation as command-line arguments."""
        remat, microbatches = self.config.model.remat, self.program.execution.microbatches
        mesh = " ".join(f"mesh.{axis}={size}" for axis, size in self.mesh_sizes.items())
        return f"{mesh} model.remat={remat} optim.grad_accumulation_steps={microbatches}"


def make_scenario(config: Config, topology: Topology) -> Scenario:
    """The scenario of a config on devices; a mesh axis of -1 takes those that the others leave.

    Raises ConfigError if the mesh does not cover the devices, or cannot divide the model or the batch.
    """
    sizes = mesh_axes(config.mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    covered = topology.size % fixed == 0 if -1 in sizes.values() else topology.size == fixed
    named = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    check(covered, f"{named}: cannot cover {topology}, which has {topology.count}")
    sizes = {axis: topology.size // fixed if size == -1 else size for axis, size in sizes.items()}
    device = AbstractDevice(device_kind=topology.chip.device_kind, num_cores=topology.n_cores, platform=topology.platform)
    names = tuple({"replicas": "z"}.get(key, key) for key in sizes)
    mesh = AbstractMesh(tuple(sizes.values()), names, (AxisType.Auto,) * len(sizes), abstract_device=device)
    vocabulary = Vocabulary(config.model.n_vocab or config.data.vocab_size)
    return Scenario(build(replaced(config, "mesh", **sizes), mesh, vocabulary), topology)


def mesh_axes(config: MeshConfig) -> dict[str, int]:
    """Mesh sizes by config key, outermost axis first; replicas only if there are several."""
    return {**({"replicas": config.replicas} if config.replicas > 1 else {}), "x": config.x, "y": config.y}


def with_mesh(config: Config, text: str | None) -> Config:
    """The config with the mesh of a text such as "x=16,y=4"; without x, x takes what y leaves. ConfigError if malformed."""
    if text is None:
        return config
    sizes = {"x": -1, "y": 1}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {text}: write a size for each axis of {', '.join(sizes)}, as in x=16,y=4")
        sizes[axis] = int(size)
    return replaced(config, "mesh", **sizes)


def replaced(config: Config, section: str, **values: Any) -> Config:
    """The config with other values in one section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in a step, on one device."""

    purpose: str  # what they carry
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float  # of the full arrays
    wire_bytes: float  # that leave a device
    links: dict[str, LinkUse]  # by kind of link; empty where the links are not known

    @property
    def seconds(self) -> float:
        """Lower bound."""
        return max((use.seconds for use in self.links.values()), default=0.0)


@dataclass(frozen=True)
class Estimate:
    """What a step needs on one device."""

    scenario: Scenario
    parameters: int  # of the model, on all devices
    # Bytes. kept: activations for the backward pass, and gradients; working: the working set of a layer.
    memory: dict[str, float]
    flops: dict[str, float]  # model (by convention), matmul (executed), kernel (Pallas kernels)
    hbm_bytes: float  # moved, if whatever is not a matrix product is fused into one
    traffic: list[Traffic]  # the slowest first
    # Lower bounds of the step in seconds, by hardware unit; ICI by mesh axis. Empty if the devices' FLOP/s are not known.
    bounds: dict[str, float]
    guess: float  # seconds of the step with typical losses; only for ranking settings
    unknown_kernels: list[str]  # kernels that are counted as free

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def limit(self) -> float:
        """Bytes that a device has."""
        return self.scenario.topology.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit

    @property
    def is_timed(self) -> bool:
        """Whether there is a time to state: of a step that fits, on devices whose FLOP/s are known."""
        return self.fits and bool(self.bounds)

    @property
    def bound(self) -> str:
        """The hardware unit that bounds the step."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def seconds(self) -> float:
        """Lower bound of a step."""
        return self.bounds[self.bound]

    def mfu(self, seconds: float) -> float:
        """Model FLOP/s as a fraction of peak, if a step takes so many seconds."""
        return self.flops["model"] / (seconds * self.scenario.topology.chip.peak_flops)

    def run(self, seconds: float) -> dict[str, float]:
        """Tokens and cost of the whole run, if a step takes so many seconds."""
        c = self.scenario.config
        tokens, total = float(c.tokens_per_step * c.steps), seconds * c.steps
        return {
            "tokens": tokens,
            "tokens_per_parameter": tokens / self.parameters,
            "days": total / 86400,
            "chip_hours": total / 3600 * self.scenario.topology.size,
        }


def estimate(scenario: Scenario, kernels: KernelFlops) -> Estimate:
    """Counts the step of a scenario and derives its bounds."""
    c = scenario.config
    work, memory = count_step(scenario.program, kernels), input_bytes(scenario)
    state = memory["parameters"] + memory["optimizer"]
    # The update reads the gradients twice (for their norm, and to apply them), and reads and writes the state.
    hbm_bytes = work.hbm_bytes + 2 * memory["parameters"] + 2 * state
    memory |= {"kept": work.kept_bytes, "working": work.working_bytes}
    tokens = c.tokens_per_step / scenario.topology.size
    flops = {"model": scenario.program.flops_per_token * tokens, "matmul": work.matmul_flops, "kernel": work.kernel_flops}
    traffic = _traffic(scenario, work)
    bounds, guess = _bounds(scenario.topology, work, hbm_bytes, traffic, kernels) if scenario.topology.has_figures else ({}, 0.0)
    n_params, unknown = scenario.program.n_params, sorted(work.unknown_kernels)
    return Estimate(scenario, n_params, memory, flops, hbm_bytes, traffic, bounds, guess, unknown)


def _bounds(
    topology: Topology, work: Work, hbm_bytes: float, traffic: list[Traffic], kernels: KernelFlops
) -> tuple[dict[str, float], float]:
    """Lower bounds of a step by hardware unit, and a guess of its time."""
    chip, kernel_flops = topology.chip, work.kernel_flops / kernels.efficiency
    bounds = {
        topology.compute_unit: (work.matmul_flops + kernel_flops) / chip.peak_flops,
        "HBM": hbm_bytes / chip.hbm_bandwidth,
    }
    for each in traffic:
        for unit, use in each.links.items():
            bounds[unit] = bounds.get(unit, 0.0) + use.seconds
    compute = (work.matmul_flops / MATMUL_EFFICIENCY + kernel_flops) / chip.peak_flops
    guess = max(compute, bounds["HBM"] / HBM_EFFICIENCY) + EXPOSED * sum(each.seconds for each in traffic)
    return bounds, guess


def input_bytes(scenario: Scenario) -> dict[str, float]:
    """Bytes on a device of the step's arguments: parameters, optimizer state, batch."""
    state, batch = scenario.program.state, jax.tree.leaves(abstract_batch(scenario.config))
    return {
        "parameters": _shard_bytes(state.params),
        "optimizer": _shard_bytes((state.opt, state.step)),
        "batch": float(sum(math.prod(a.shape) * a.dtype.itemsize for a in batch)) / n_row_groups(scenario.program.mesh),
    }


def _shard_bytes(tree: Any) -> float:
    return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)))


def _traffic(scenario: Scenario, work: Work) -> list[Traffic]:
    mesh, out = scenario.mesh_sizes, []
    for (kind, over), count in work.count.items():
        axes = tuple(axis for axis in over if mesh[axis] > 1)
        n = math.prod(mesh[axis] for axis in axes)
        if n == 1:
            continue
        full = float(work.bytes[kind, over])
        links = scenario.topology.links(kind, full, mesh, axes)
        purpose = _PURPOSE.get((kind, "".join(axes)), "other")
        out.append(Traffic(purpose, kind, axes, count, full, full * sent_fraction(kind, n), links))
    return sorted(out, key=lambda each: (-each.seconds, -each.wire_bytes))
