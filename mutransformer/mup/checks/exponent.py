"""How the best learning rate follows the size: the exponent of a power law, and the published ones. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mutransformer.mup.checks.optimum import Bounds, combine, standard_error
from mutransformer.mup.checks.transfer import Variant

# Of the best learning rate with the number of tokens at a fixed batch, and with the batch: Complete(d)P (Mlodozeniec et al.,
# arXiv 2512.22382, Table 1) and the recipe of Delphi (openathena.ai/blog/delphi), which has another exponent of tokens.
PUBLISHED = {
    "tokens": {"Complete(d)P": -0.5, "Delphi": -0.3, "no rule": 0.0},
    "batch": {"Complete(d)P": 0.5, "no rule": 0.0},
}


@dataclass(frozen=True)
class Exponent:
    """The best learning rate grows as size^slope."""

    slope: Bounds  # with the larger of the standard errors over seeds and of the straight line
    sizes: list[int]  # whose optimum was found

    @property
    def known(self) -> bool:
        """Whether there is any measure of the slope's uncertainty over seeds or sizes."""
        return self.slope.stderr is not None

    def agrees(self, exponent: float) -> bool:
        """Whether an exponent is within twice the uncertainty."""
        return abs(self.slope.low - exponent) <= 2 * self.slope.uncertainty + 1e-9


def fit_exponent(variant: Variant) -> Exponent | None:
    """The slope of log2(optimum) against log2(size), by least squares; None with fewer than two optima."""
    fits = {size: fit for size, fit in variant.fits.items() if fit.optimum.is_point}
    if len(fits) < 2:
        return None
    x = np.log2(list(fits))
    weights = ((x - x.mean()) / np.sum((x - x.mean()) ** 2)).tolist()  # the slope is the sum of weight x optimum
    slope = combine([(weight, fit.optimum) for weight, fit in zip(weights, fits.values(), strict=True)])
    common = sorted(set.intersection(*(set(fit.seed_optima) for fit in fits.values())))
    by_seed = standard_error([_weighted(weights, [fit.seed_optima[seed] for fit in fits.values()]) for seed in common])
    optima = np.array([fit.optimum.low for fit in fits.values()])
    residuals = optima - optima.mean() - slope.low * (x - x.mean())
    freedom = len(fits) - 2
    of_line = math.sqrt(float(np.sum(residuals**2)) / freedom / float(np.sum((x - x.mean()) ** 2))) if freedom else None
    errors = [error for error in (by_seed, of_line) if error is not None]
    return Exponent(replace(slope, stderr=max(errors, default=None)), list(fits))


def _weighted(weights: Sequence[float], optima: Sequence[float | None]) -> float | None:
    found = [optimum for optimum in optima if optimum is not None]
    return sum(w * at for w, at in zip(weights, found, strict=True)) if len(found) == len(optima) else None


def exponent_in_words(variant: Variant) -> str:
    """The exponent, and the published ones that it agrees with; empty over an axis for which none is published."""
    published = PUBLISHED.get(variant.axis.name)
    if published is None:
        return ""
    fit = fit_exponent(variant)
    if fit is None:
        return f"no exponent with {variant.axis.name}: fewer than two optima were found"
    words = f"the optimum follows {variant.axis.name}^p, p = {fit.slope}"
    if len(fit.sizes) < len(variant.sizes):
        words += f" from {len(fit.sizes)} of {len(variant.sizes)} sizes"
    if not fit.known:
        return f"{words}: two sizes and one seed, so no uncertainty to compare with published exponents"
    sides = {True: "consistent with", False: "not with"}
    parts = []
    for agrees, side in sides.items():
        if listed := [f"{exponent:g} ({name})" for name, exponent in published.items() if fit.agrees(exponent) == agrees]:
            parts.append(f"{side} {', '.join(listed)}")
    return f"{words}: {'; '.join(parts)}"
