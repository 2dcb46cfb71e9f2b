"""A short sweep over two widths on the embedded text: where the best learning rate lies at each."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax

from mutransformer.errors import FINISHED, translate_errors
from mutransformer.mup.checks.transfer import Variant, analyze
from mutransformer.mup.checks.transfer_verdicts import drift_in_words
from mutransformer.mup.checks.verdict import CheckError
from mutransformer.study.hardware.section import Result, SectionFailed, Task
from mutransformer.study.hardware.sizes import TransferSize
from mutransformer.study.sweep import grid, records
from mutransformer.study.sweep.run import sweep

CAVEAT = (
    "This is short: one seed and few steps. It shows that sweeps run here and roughly where the best rates lie; whether a rate "
    "transfers is what the studies in results/ are for."
)


def short_transfer(task: Task, size: TransferSize) -> Iterator[Result]:
    """Trains each rate at both widths under each rule, as many at once as fit. A rule that would not end in time is left out.

    Raises SectionFailed if a sweep was stopped, or if every run of a width diverged.
    """
    points = [(2.0**rate, 0) for rate in size.rates]
    config = task.config(size.settings)
    result: Result = {"widths": list(size.widths), "rates": list(size.rates), "steps": config.steps}
    result |= {"tokens_per_step": config.tokens_per_step, "devices": jax.device_count(), "rules": [], "left_out": []}
    result |= {"compute": "", "caveat": CAVEAT}
    longest, folder = 0.0, (task.scratch or task.folder) / "transfer"
    for rule in size.rules:
        began = time.monotonic()
        if why := task.too_late_for(1.2 * longest, f"{size.rules[0]} took {longest:.0f} s"):
            result["left_out"].append(f"{rule}: {why}")
            yield result
            continue
        settings = [*size.settings, f"optim.rule={rule}", *task.settings]
        for variant in grid.configs(settings, "width", size.widths):
            task.say(f"{rule}, {variant.where}: {len(points)} rates, {config.steps} steps")
            if sweep([variant], points, folder) != FINISHED:
                raise SectionFailed("the sweep was stopped")
        runs = [run for run in records.read(folder) if run.variant == rule]
        result["compute"] = runs[0].settings.get("precision.compute", "float32")
        result["rules"].append({"rule": rule, "seconds": time.monotonic() - began, **summary(rule, runs)})
        longest = max(longest, time.monotonic() - began)
        yield result


def summary(rule: str, runs: list[records.Run]) -> Result:
    """Losses, optima and drift of the runs of one rule. Rates are log2."""
    with translate_errors("", CheckError):
        # As the subject, whatever its name: `analyze` refuses a study that has controls only.
        (variant,) = analyze([replace(run, variant=f"rule {rule}") for run in runs], (), None, records.AXES["width"])
    lost = [width for width, fit in variant.fits.items() if fit.best is None]
    if lost:
        raise SectionFailed(f"{rule}: every run of width {lost[0]} diverged")
    small = variant.fits[variant.sizes[0]].best
    return {
        "drift": _drift(variant),
        "words": drift_in_words(variant),
        "sizes": [_size(variant, size, small) for size in variant.sizes],
    }


def _drift(variant: Variant) -> float | None:
    """Octaves between the optima; None if one was not found within the grid."""
    return variant.drift.low if variant.drift.is_point else None


def _size(variant: Variant, size: int, tuned: float | None) -> dict[str, Any]:
    fit = variant.fits[size]
    penalty = fit.penalty(tuned)
    return {
        "width": size,
        "losses": [_finite(fit.losses.get(rate)) for rate in variant.rates],
        "best_rate": fit.best,
        "best_loss": _finite(fit.best_loss),
        "optimum": str(fit.optimum),
        "penalty": _finite(penalty),  # of the narrower width's best rate, in nats
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
