"""Which settings would make a step fit into memory, for a plan that does not."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError
from mutransformer.planning.estimate.bounds import Estimate, estimate, make_scenario, replaced
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.topology import Topology

TRIES = 8  # doublings of microbatches, or of devices


class Remedy(NamedTuple):
    """Settings as a user types them, and the bytes that a device then needs."""

    settings: str
    peak_bytes: float


def remedies(found: Estimate, by_remat: Mapping[str, Estimate], kernels: KernelFlops, limit: float) -> list[Remedy]:
    """The least change of each kind with which a step needs at most `limit` bytes; empty if it does, or if nothing helps.

    The kinds: the policy of rematerialization with the fewest FLOPs; microbatches; both; more devices.
    """
    if found.peak_bytes <= limit:
        return []
    out = []
    kept = [each for each in by_remat.values() if each.peak_bytes <= limit]
    policy = min(kept, key=lambda each: (each.flops["matmul"], each.peak_bytes), default=None)
    if policy:
        out.append(Remedy(f"model.remat={policy.scenario.config.model.remat}", policy.peak_bytes))
    config, topology = found.scenario.config, found.scenario.topology
    accumulated = _first_that_fits(_accumulated(config, topology, kernels), limit)
    if accumulated:
        out.append(Remedy(_steps(accumulated), accumulated.peak_bytes))
    elif not policy and (least := min(by_remat.values(), key=lambda each: each.peak_bytes, default=None)):
        both = _first_that_fits(_accumulated(least.scenario.config, topology, kernels), limit)
        if both:
            out.append(Remedy(f"model.remat={both.scenario.config.model.remat} {_steps(both)}", both.peak_bytes))
    if more := _first_that_fits(_on_more(config, topology, kernels), limit):
        settings = f"--topology {more.scenario.topology}"
        settings += f" --mesh x={more.scenario.mesh_sizes['x']},y={more.scenario.mesh_sizes['y']}"
        out.append(Remedy(settings, more.peak_bytes))
    return out


def _steps(each: Estimate) -> str:
    return f"optim.grad_accumulation_steps={each.scenario.program.execution.microbatches}"


def _first_that_fits(tried: Iterator[Estimate], limit: float) -> Estimate | None:
    try:
        return next((each for each in tried if each.peak_bytes <= limit), None)
    except ConfigError:  # fewer rows at a time than devices along x, or a mesh that does not divide the model
        return None


def _accumulated(config: Config, topology: Topology, kernels: KernelFlops) -> Iterator[Estimate]:
    n = make_scenario(config, topology).program.execution.microbatches
    for _ in range(TRIES):
        n *= 2
        if config.data.batch_size % n:
            return
        yield estimate(make_scenario(replaced(config, "optim", grad_accumulation_steps=n), topology), kernels)


def _on_more(config: Config, topology: Topology, kernels: KernelFlops) -> Iterator[Estimate]:
    for _ in range(TRIES):
        larger = topology.larger()
        if larger is None:
            return
        topology = larger
        yield estimate(make_scenario(replaced(config, "mesh", x=-1), topology), kernels)
