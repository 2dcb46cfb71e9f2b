"""Meshes, remat policies and gradient accumulation for a config on a slice: the settings that fit, ranked by estimated time."""

import math
import typing
from collections.abc import Iterator

from mutransformer.config.schema import Config, ModelConfig
from mutransformer.errors import ConfigError, check
from mutransformer.planning.chips import Topology
from mutransformer.planning.estimate.bounds import Estimate, estimate
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.scenario import make_scenario, mesh_axes, replaced


def search(config: Config, topology: Topology, kernels: KernelFlops) -> list[Estimate]:
    """The settings that fit, fastest first: each mesh and remat policy with the fewest accumulation steps that fit.

    More accumulation steps only gather the weights more often.

    Raises:
        ConfigError: nothing fits; or no mesh divides model and batch, with the reason for the first mesh tried.
    """
    found: list[Estimate] = []
    refusals: list[ConfigError] = []
    for candidate in meshes(config, topology):
        for policy in remat_policies():
            try:
                found.append(_fewest_accumulation_steps(replaced(candidate, "model", remat=policy), topology, kernels))
            except ConfigError as error:
                refusals.append(error)
    if not found:
        raise refusals[0]
    if not any(each.fits for each in found):
        smallest = min(found, key=lambda each: each.peak_bytes)
        raise ConfigError(
            f"--search: nothing fits on {topology}: the smallest needs {smallest.peak_bytes / 1e9:.1f} GB on a chip of "
            f"{topology.chip.hbm_bytes / 1e9:.0f} GB, with {smallest.scenario.settings}"
        )
    return sorted((each for each in found if each.fits), key=lambda each: each.guess)


def remat_policies() -> tuple[str, ...]:
    """The values that model.remat can have."""
    return typing.get_args(typing.get_type_hints(ModelConfig)["remat"])


def by_remat_policy(base: Estimate, kernels: KernelFlops) -> dict[str, Estimate]:
    """The same scenario under every remat policy."""
    config, topology = base.scenario.config, base.scenario.topology
    out = dict.fromkeys(remat_policies(), base)
    for policy in set(out) - {config.model.remat}:
        out[policy] = estimate(make_scenario(replaced(config, "model", remat=policy), topology), kernels)
    return out


def meshes(config: Config, topology: Topology) -> Iterator[Config]:
    """The config with every x and y that cover the slice; other axes keep their size."""
    others = math.prod(size for axis, size in mesh_axes(config.mesh).items() if axis not in ("x", "y"))
    check(topology.size % others == 0, f"--search: {topology} has {topology.size} chips, not a multiple of {others}")
    n = topology.size // others
    yield from (replaced(config, "mesh", x=n // y, y=y) for y in range(1, n + 1) if n % y == 0)


def _fewest_accumulation_steps(config: Config, topology: Topology, kernels: KernelFlops) -> Estimate:
    """The estimate with the fewest accumulation steps (a power of two) that fits; if none fits, the smallest."""
    best: Estimate | None = None
    n = 1
    while config.data.batch_size % n == 0 and not (best and best.fits):
        try:
            found = estimate(make_scenario(replaced(config, "optim", grad_accumulation_steps=n), topology), kernels)
        except ConfigError:
            if best is None:
                raise
            break  # fewer rows at a time than devices along x
        best = found if best is None or found.peak_bytes < best.peak_bytes else best
        n *= 2
    assert best is not None
    return best
