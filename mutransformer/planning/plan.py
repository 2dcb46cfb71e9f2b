"""The planner: what a step of a config costs on a TPU slice, and which settings fit there."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group

from mutransformer.config.schema import Config
from mutransformer.planning import tables
from mutransformer.planning.as_json import plan_json
from mutransformer.planning.chips import parse_topology
from mutransformer.planning.compiled.compiler import compile_step, require_compiler
from mutransformer.planning.compiled.simulate import Simulated, simulate
from mutransformer.planning.estimate.bounds import Estimate, estimate
from mutransformer.planning.kernel_flops import SPLASH_ONLY, KernelFlops
from mutransformer.planning.scenario import make_scenario, with_mesh
from mutransformer.planning.search import by_remat_policy, search


class _Shown:
    """str() gives the tables that a rich console shows, in 100 columns."""

    def __str__(self) -> str:
        console = Console(width=100, highlight=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass(frozen=True)
class Plan(_Shown):
    """What a step costs.

    Attributes:
        estimate: lower bounds, by arithmetic.
        by_remat: the same under each value of model.remat; not for an entry of a ranking.
        simulated: the simulated schedule of the TPU compiler; None if it was not compiled.
    """

    estimate: Estimate
    by_remat: dict[str, Estimate]
    simulated: Simulated | None

    def __rich__(self) -> Group:
        shown = tables.estimate_tables(self.estimate, self.by_remat)
        return Group(shown, "", tables.simulated_tables(self.simulated, self.estimate)) if self.simulated else shown

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible data."""
        return plan_json(self.estimate, self.by_remat, self.simulated)


@dataclass(frozen=True)
class Ranking(_Shown):
    """Settings that fit, fastest first."""

    plans: list[Plan]

    def __rich__(self) -> Group:
        return tables.ranking_table([(each.estimate, each.simulated) for each in self.plans])

    def as_json(self) -> list[dict[str, Any]]:
        """JSON-compatible data."""
        return [each.as_json() for each in self.plans]


def plan(
    config: Config, topology: str, *, mesh: str | None = None, compile: bool = False, kernels: KernelFlops = SPLASH_ONLY
) -> Plan:
    """Plans a step of a config on a TPU slice that need not be at hand.

    Args:
        config: the run's config.
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
    simulated = _simulate(found, kernels) if compile else None
    return Plan(found, by_remat_policy(found, kernels), simulated)


def rank(config: Config, topology: str, *, top: int = 10, compile_top: int = 0, kernels: KernelFlops = SPLASH_ONLY) -> Ranking:
    """The `top` best meshes, remat policies and accumulation steps on a slice, the first `compile_top` of them compiled.

    Raises:
        ConfigError: no such slice, nothing fits, or no compiler.
    """
    if compile_top:
        require_compiler()
    found = search(config, parse_topology(topology), kernels)[:top]
    return Ranking([Plan(each, {}, _simulate(each, kernels) if i < compile_top else None) for i, each in enumerate(found)])


def _simulate(found: Estimate, kernels: KernelFlops) -> Simulated:
    return simulate(found.scenario, compile_step(found.scenario), kernels)
