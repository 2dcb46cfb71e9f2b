"""The planner: what a step of a config costs on TPUs or GPUs, and which settings fit there, ranked by estimated time."""

import itertools
import math
import typing
from collections.abc import Iterator

from mutransformer.config.schema import Config, ModelConfig
from mutransformer.errors import ConfigError, check
from mutransformer.planning.compiled.compilers import compile_step, require_compiler
from mutransformer.planning.compiled.simulate import Simulated, simulate
from mutransformer.planning.estimate.bounds import Estimate, estimate, make_scenario, mesh_axes, replaced, with_mesh
from mutransformer.planning.kernel_flops import BUILT_IN, KernelFlops
from mutransformer.planning.machines import parse_topology
from mutransformer.planning.remedies import remedies
from mutransformer.planning.report import Plan, Ranking
from mutransformer.planning.topology import Topology


def plan(
    config: Config, topology: str, *, mesh: str | None = None, compile: bool = False, kernels: KernelFlops = BUILT_IN
) -> Plan:
    """Plans a step of a config on TPUs or GPUs that need not be at hand.

    Args:
        topology: TPU chips along each axis, `v5p:4x4x4`, or Google Cloud's name, `v5p-128`; nodes x GPUs, `h100:4x8`; or `here`.
        mesh: `x=16,y=4`, instead of the config's mesh.
        compile: also compile the step with the compiler of these devices (which needs none of them) and simulate its schedule.
        kernels: FLOPs of other Pallas kernels than splash attention.

    Raises:
        ConfigError: no such devices, a mesh that does not cover them or cannot divide model or batch, or no compiler.
    """
    machine = parse_topology(topology)
    if compile:
        require_compiler(machine)
    found = estimate(make_scenario(with_mesh(config, mesh), machine), kernels)
    by_remat, simulated = by_remat_policy(found, kernels), _simulate(found, kernels) if compile else None
    # The compiler knows the memory better: settings that would fit are those whose estimate is so much smaller than this one's.
    limit = found.limit * (found.peak_bytes / simulated.peak_bytes if simulated else 1.0)
    return Plan(found, by_remat, simulated, remedies(found, by_remat, kernels, limit))


def rank(config: Config, topology: str, *, top: int = 10, compile_top: int = 0, kernels: KernelFlops = BUILT_IN) -> Ranking:
    """The `top` best meshes, remat policies and accumulation steps on some devices, the first `compile_top` of them compiled.

    Raises ConfigError if there are no such devices, nothing fits, or there is no compiler.
    """
    machine = parse_topology(topology)
    if compile_top:
        require_compiler(machine)
    found = search(config, machine, kernels)[:top]
    return Ranking([Plan(each, {}, _simulate(each, kernels) if i < compile_top else None) for i, each in enumerate(found)])


def _simulate(found: Estimate, kernels: KernelFlops) -> Simulated:
    return simulate(found.scenario, compile_step(found.scenario), kernels)


def search(config: Config, topology: Topology, kernels: KernelFlops) -> list[Estimate]:
    """The settings that fit, fastest first: each mesh and remat policy with the fewest accumulation steps that fit.

    More accumulation steps only gather the weights more often. They are a power of two.

    Raises ConfigError if nothing fits, or if no mesh divides model and batch, with the reason for the first mesh tried.
    """
    smallest: list[Estimate] = []  # of each mesh and policy
    refusals: list[ConfigError] = []
    for candidate, policy in itertools.product(meshes(config, topology), remat_policies()):
        tried: list[Estimate] = []
        n = 1
        try:
            while config.data.batch_size % n == 0 and not (tried and tried[-1].fits):
                settings = replaced(replaced(candidate, "model", remat=policy), "optim", grad_accumulation_steps=n)
                tried.append(estimate(make_scenario(settings, topology), kernels))
                n *= 2
        except ConfigError as error:  # an impossible mesh; with n > 1: fewer rows at a time than devices along x
            refusals.append(error)
        if tried:
            smallest.append(min(tried, key=lambda each: each.peak_bytes))
    if not smallest:
        raise refusals[0]
    # On devices whose speed is not known: the least work first.
    found = sorted((each for each in smallest if each.fits), key=lambda each: (each.guess, each.flops["matmul"], _moved(each)))
    least = min(smallest, key=lambda each: each.peak_bytes)
    check(
        bool(found),
        f"--search: nothing fits on {topology}: the smallest needs {least.peak_bytes / 1e9:.1f} GB on a {topology.noun} of "
        f"{topology.chip.hbm_bytes / 1e9:.0f} GB, with {least.scenario.settings}",
    )
    return found


def _moved(each: Estimate) -> float:
    return sum((traffic.wire_bytes for traffic in each.traffic), 0.0)


def meshes(config: Config, topology: Topology) -> Iterator[Config]:
    """The config with every x and y that cover the devices; other axes keep their size."""
    others = math.prod(size for axis, size in mesh_axes(config.mesh).items() if axis not in ("x", "y"))
    check(topology.size % others == 0, f"--search: {topology} has {topology.count}, not a multiple of {others}")
    n = topology.size // others
    yield from (replaced(config, "mesh", x=n // y, y=y) for y in range(1, n + 1) if n % y == 0)


def remat_policies() -> tuple[str, ...]:
    """The values that model.remat can have."""
    return typing.get_args(typing.get_type_hints(ModelConfig)["remat"])


def by_remat_policy(base: Estimate, kernels: KernelFlops) -> dict[str, Estimate]:
    """The same scenario under every remat policy."""
    config, found = base.scenario.config, dict.fromkeys(remat_policies(), base)
    for policy in set(found) - {config.model.remat}:
        found[policy] = estimate(make_scenario(replaced(config, "model", remat=policy), base.scenario.topology), kernels)
    return found
