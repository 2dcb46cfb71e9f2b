"""Meshes, rematerialisation and microbatches for a config on a slice: what fits, ranked by what it may take."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator

from mutransformer.config.schema import Config, ModelConfig
from mutransformer.errors import ConfigError
from mutransformer.planning.case import Case, axes, make
from mutransformer.planning.chips import Topology
from mutransformer.planning.estimate import Estimate, estimate
from mutransformer.planning.kernels import Kernels


def search(config: Config, topology: Topology, kernels: Kernels) -> list[Estimate]:
    """For each mesh and policy the fewest microbatches that fit, for more only gather weights more often; the fastest first.

    Raises:
        ConfigError: nothing fits; or no mesh can divide model and batch, with the reason for the first that was tried.
    """
    fitting: list[Estimate] = []
    too_large: list[Estimate] = []
    refusals: list[ConfigError] = []
    for each in meshes(config, topology):
        for policy in policies():
            with_policy = dataclasses.replace(each, model=dataclasses.replace(each.model, remat=policy))
            try:
                found = _fewest_microbatches(with_policy, topology, kernels)
            except ConfigError as error:
                refusals.append(error)
            else:
                (fitting if found.fits else too_large).append(found)
    if not fitting and too_large:
        least = min(too_large, key=lambda each: each.peak)
        raise ConfigError(
            f"--search: nothing fits on {topology}: the least is {least.peak / 1e9:.1f} GB on a chip of "
            f"{topology.chip.hbm_bytes / 1e9:.0f} GB, with {describe(least.case)}"
        )
    if not fitting:
        raise refusals[0]
    return sorted(fitting, key=lambda each: each.guess)


def policies() -> tuple[str, ...]:
    """The values that model.remat can have."""
    return typing.get_args(typing.get_type_hints(ModelConfig)["remat"])


def by_policy(found: Estimate, kernels: Kernels) -> dict[str, Estimate]:
    """The same case under every policy."""
    config, out = found.case.config, dict.fromkeys(policies(), found)
    for policy in out:
        if policy != config.model.remat:
            other = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
            out[policy] = estimate(make(other, found.case.topology), kernels)
    return out


def meshes(config: Config, topology: Topology) -> Iterator[Config]:
    """The config with every x and y that cover the slice; other axes stay."""
    others = math.prod(size for axis, size in axes(config.mesh).items() if axis not in ("x", "y"))
    if topology.size % others:
        raise ConfigError(f"--search: {topology} has {topology.size} chips, not a multiple of {others}")
    n = topology.size // others
    for y in (y for y in range(1, n + 1) if n % y == 0):
        yield dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, x=n // y, y=y))


def describe(case: Case) -> str:
    """Its settings, as they are given on the command line."""
    mesh = " ".join(f"mesh.{axis}={size}" for axis, size in case.sizes.items())
    return (
        f"{mesh} model.remat={case.config.model.remat} optim.grad_accumulation_steps={case.config.optim.grad_accumulation_steps}"
    )


def _fewest_microbatches(config: Config, topology: Topology, kernels: Kernels) -> Estimate:
    best: Estimate | None = None
    for parts in itertools.takewhile(lambda n: config.data.batch_size % n == 0, (2**i for i in itertools.count())):
        tried = dataclasses.replace(config, optim=dataclasses.replace(config.optim, grad_accumulation_steps=parts))
        try:
            found = estimate(make(tried, topology), kernels)
        except ConfigError:
            if best is None:
                raise
            break  # fewer rows at a time than devices along x
        if best is None or found.peak < best.peak:
            best = found
        if found.fits:
            break
    assert best is not None
    return best
