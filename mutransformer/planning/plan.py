"""The planner: what a step of a config costs on a TPU slice, and which settings fit there, ranked by estimated time."""

import itertools
import math
import typing
from collections.abc import Iterator

from mutransformer.config.schema import Config, ModelConfig
from mutransformer.errors import ConfigError, check
from mutransformer.planning.chips import Topology, parse_topology
from mutransformer.planning.compiled.simulate import Simulated, compile_step, require_compiler, simulate
from mutransformer.planning.estimate.bounds import Estimate, estimate, make_scenario, mesh_axes, replaced, with_mesh
from mutransformer.planning.kernel_flops import SPLASH_ONLY, KernelFlops
from mutransformer.planning.report import Plan, Ranking


def plan(
    config: Config, topology: str, *, mesh: str | None = None, compile: bool = False, kernels: KernelFlops = SPLASH_ONLY
) -> Plan:
    """Plans a step of a config on a TPU slice that need not be at hand.

    Args:
        topology: chips along each axis, `v5p:4x4x4`, or Google Cloud's name, `v5p-128`.
        mesh: `x=16,y=4`, instead of the config's mesh.
        compile: also compile the step with the TPU compiler (needs libtpu, but no TPU) and simulate its schedule.
        kernels: FLOPs of other Pallas kernels than splash attention.

    Raises:
        ConfigError: no such slice, a mesh that does not cover it or cannot divide model or batch, or no compiler.
    """
    if compile:
        require_compiler()
    found = estimate(make_scenario(with_mesh(config, mesh), parse_topology(topology)), kernels)
    return Plan(found, by_remat_policy(found, kernels), _simulate(found, kernels) if compile else None)


def rank(config: Config, topology: str, *, top: int = 10, compile_top: int = 0, kernels: KernelFlops = SPLASH_ONLY) -> Ranking:
    """The `top` best meshes, remat policies and accumulation steps on a slice, the first `compile_top` of them compiled.

    Raises ConfigError if there is no such slice, nothing fits, or there is no compiler.
    """
    if compile_top:
        require_compiler()
    found = search(config, parse_topology(topology), kernels)[:top]
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
    found = sorted((each for each in smallest if each.fits), key=lambda each: each.guess)
    least = min(smallest, key=lambda each: each.peak_bytes)
    check(
        bool(found),
        f"--search: nothing fits on {topology}: the smallest needs {least.peak_bytes / 1e9:.1f} GB on a chip of "
        f"{topology.chip.hbm_bytes / 1e9:.0f} GB, with {least.scenario.settings}",
    )
    return found


def meshes(config: Config, topology: Topology) -> Iterator[Config]:
    """The config with every x and y that cover the slice; other axes keep their size."""
    others = math.prod(size for axis, size in mesh_axes(config.mesh).items() if axis not in ("x", "y"))
    check(topology.size % others == 0, f"--search: {topology} has {topology.size} chips, not a multiple of {others}")
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
