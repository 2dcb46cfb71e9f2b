"""The optimum of a coarse grid: what its uncertainty covers, and means over unequal seeds, on curves that are known exactly."""

import math

import numpy as np
import pytest
from sweeps import RATES, make_run, sweep

from mutransformer.mup.checks.exponent import exponent_in_words, fit_exponent
from mutransformer.mup.checks.optimum import LEAST, Bounds, combine, locate
from mutransformer.mup.checks.runs import ScalingAxis
from mutransformer.mup.checks.transfer import Cell, Variant, analyze, mean_losses

GRID = [float(rate) for rate in range(-4, 4)]


@pytest.mark.parametrize("grid", [GRID, [-4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 1.0, 2.0], [-3.0, -1.0, 0.0, 2.5, 3.0]])
@pytest.mark.parametrize("at", [-0.3, 0.0, 0.2])
def test_all_curves_agree_on_a_parabola(grid: list[float], at: float) -> None:
    found = locate({rate: 3 + 0.2 * (rate - at) ** 2 for rate in grid})
    assert found.low == pytest.approx(at, abs=1e-9) and len(found.others) >= 2
    assert list(found.others.values()) == pytest.approx([at] * len(found.others), abs=1e-6)
    assert found.grid == pytest.approx(LEAST * found.spacing)


def test_without_a_second_neighbor_half_the_spacing_is_unknown() -> None:
    assert locate({-1.0: 2.0, 0.0: 1.0, 1.0: 2.5}).grid == 0.5
    assert locate({-2.0: math.inf, -1.0: 2.0, 0.0: 1.0, 2.0: 2.5, 3.0: math.inf}).grid == 1.0


def test_a_finer_grid_is_less_uncertain() -> None:
    def skewed(rate: float) -> float:
        return math.exp(1.2 * rate) / 1.2 + math.exp(-0.5 * rate) / 0.5

    coarse, fine = (locate({rate: skewed(rate + 0.2) for rate in grid}) for grid in (GRID, np.arange(-4, 4, 0.5).tolist()))
    assert abs(coarse.low + 0.2) > 0.05 > abs(fine.low + 0.2)
    assert coarse.grid and fine.grid and coarse.grid > 2 * fine.grid > 2 * abs(fine.low + 0.2)


def kinked(parameters: np.ndarray, x):
    """A soft kink, steeper on the right, and a parabola."""
    slope, ratio, sharpness, curvature = parameters
    return slope * np.log(np.exp(-ratio * sharpness * x) + np.exp(sharpness * x)) / sharpness + curvature * x**2


def simulated(changes: float, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drifts between two skewed curves that a grid of one octave gives: their errors, uncertainties, and errors of the optima.

    `changes` is the standard deviation of the logarithm by which each parameter of the curves differs between the two.
    """
    rng = np.random.default_rng(0)
    fine = np.linspace(-2, 2, 4001)
    errors, uncertainties, single = [], [], []
    while len(errors) < n:
        shape = np.array([0.3, rng.uniform(0.2, 1), rng.uniform(1, 6), rng.uniform(0.02, 0.08)])
        phase, shift = rng.uniform(-0.5, 0.5), 0.3 * rng.normal()
        found: list[Bounds] = []
        for parameters, place in ((shape, phase), (shape * np.exp(changes * rng.normal(size=4)), phase + shift)):
            least = fine[np.argmin(kinked(parameters, fine))]
            found.append(locate({rate: float(kinked(parameters, rate - place + least)) for rate in GRID}))
            single.append(found[-1].low - place)
        if all(at.is_point for at in found):
            drift = combine([(1.0, found[1]), (-1.0, found[0])])
            errors.append(drift.low - shift)
            uncertainties.append(drift.uncertainty)
    return np.abs(errors), np.array(uncertainties), np.abs(single)


@pytest.mark.parametrize("changes", [0.0, 0.2, 0.4])
def test_twice_the_uncertainty_covers_the_error_of_a_drift(changes: float) -> None:
    errors, uncertainties, single = simulated(changes)
    assert np.mean(errors <= 2 * uncertainties) > 0.98
    assert np.mean(uncertainties > 0.8) < 0.05  # it does not cover by saying nothing
    # The controls: the error is there, and the resolution of the grid alone does not cover that of an optimum.
    assert np.quantile(single, 0.9) > 2 * LEAST


def test_an_error_that_two_sizes_share_cancels() -> None:
    curve = {rate: math.exp(1.2 * rate) / 1.2 + math.exp(-0.5 * rate) / 0.5 for rate in GRID}
    one, other = locate(curve), locate({rate: loss - 0.5 for rate, loss in curve.items()})
    drift = combine([(1.0, one), (-1.0, other)])
    assert drift.low == pytest.approx(0, abs=1e-9) and drift.grid == pytest.approx(math.hypot(LEAST, LEAST))
    assert one.grid and one.grid > 2 * LEAST
    few = locate({rate: curve[rate] for rate in (-1.0, 0.0, 1.0)})  # the control: no curve in common
    assert combine([(1.0, one), (-1.0, few)]).grid == pytest.approx(math.hypot(one.grid, 0.5))


# Unequal seeds

EFFECTS = {0: -0.3, 1: 0.1, 2: 0.2}  # of the seeds on every loss, far more than a step of the grid


def cells(grid: dict[float, tuple[int, ...]], at: float = -5.7) -> dict[float, Cell]:
    return {rate: Cell({seed: 4 + 0.1 * (rate - at) ** 2 + EFFECTS[seed] for seed in seeds}) for rate, seeds in grid.items()}


def test_means_are_those_of_all_seeds_where_some_are_missing() -> None:
    every, half = (0, 1, 2), (0,)
    found = cells({-8.0: every, -7.0: every, -6.0: every, -5.5: half, -5.0: (0, 2), -4.0: every})
    losses = mean_losses(found)
    assert losses == pytest.approx({rate: 4 + 0.1 * (rate + 5.7) ** 2 for rate in found}, abs=1e-9)
    assert locate(losses).low == pytest.approx(-5.7, abs=1e-9)
    plain = locate({rate: cell.mean for rate, cell in found.items()})  # the control
    assert not plain.is_point or abs(plain.low + 5.7) > 0.05
    full = cells(dict.fromkeys([-8.0, -7.0, -6.0], every))
    assert mean_losses(full) == {rate: cell.mean for rate, cell in full.items()}


def test_a_rate_that_shares_no_seed_is_left_out_and_a_diverged_one_diverged() -> None:
    found = cells({-8.0: (0, 1), -7.0: (0, 1), -6.0: (1,), -5.0: (2,)})
    assert list(mean_losses(found)) == [-8.0, -7.0, -6.0]
    found[-4.0] = Cell({0: 4.0, 1: math.inf})
    assert mean_losses(found)[-4.0] == math.inf


def test_a_half_octave_at_one_width_changes_nothing_elsewhere() -> None:
    points = [(width, r, s) for width in (64, 128) for s in EFFECTS for r in RATES]
    runs = [make_run("mup", width, r, s, 5 + EFFECTS[s] + 0.1 * (r + 5.7) ** 2) for width, r, s in points]
    extra = make_run("mup", 64, -5.5, 0, 5 + EFFECTS[0] + 0.1 * 0.2**2)
    (plain,), (more,) = analyze(runs), analyze([*runs, extra])
    assert more.fits[128] == plain.fits[128]
    assert more.fits[64].optimum.low == pytest.approx(-5.7, abs=1e-9) and more.fits[64].best == -5.5
    assert more.drift.low == pytest.approx(0, abs=1e-9) and more.drift.stderr == pytest.approx(0, abs=1e-9)
    assert [(gap.size, gap.rate, gap.seeds) for gap in more.missing] == [(64, -5.5, [1, 2])] and not plain.missing


# Exponents

TOKENS = ScalingAxis("tokens", lambda run: run.width * 1024)


SIZES = (64, 128, 256, 512)


def by_tokens(exponent: float, noise: float = 0.0, seeds: tuple[int, ...] = (0, 1, 2), sizes: tuple[int, ...] = SIZES) -> Variant:
    """A variant whose optimum follows tokens^exponent, each seed's with an error of its own."""

    def optimum(size: int, seed: int) -> float:
        jitter = noise * float(np.random.default_rng([size, seed]).normal())
        return -6 + exponent * math.log2(size / 64) + jitter

    points = [(size, rate, seed) for size in sizes for rate in RATES for seed in seeds]
    runs = [make_run("mup", size, r, seed, 5 + 0.1 * (r - optimum(size, seed)) ** 2) for size, r, seed in points]
    (variant,) = analyze(runs, axis=TOKENS)
    return variant


@pytest.mark.parametrize(
    ("exponent", "words"),
    [
        (-0.5, "consistent with -0.5 (Complete(d)P); not with -0.3 (Delphi), 0 (no rule)"),
        (-0.3, "consistent with -0.3 (Delphi); not with -0.5 (Complete(d)P), 0 (no rule)"),
        (0.0, "consistent with 0 (no rule); not with -0.5 (Complete(d)P), -0.3 (Delphi)"),
        (-0.8, "not with -0.5 (Complete(d)P), -0.3 (Delphi), 0 (no rule)"),
    ],
)
def test_an_exponent_is_found_and_compared_with_the_published(exponent: float, words: str) -> None:
    variant = by_tokens(exponent)
    fit = fit_exponent(variant)
    assert fit is not None and fit.slope.low == pytest.approx(exponent, abs=1e-9) and fit.sizes == variant.sizes
    x = np.arange(4) - 1.5
    assert fit.slope.grid == pytest.approx(LEAST / math.sqrt(float(x @ x)))
    assert exponent_in_words(variant) == f"the optimum follows tokens^p, p = {fit.slope}: {words}"


def test_the_uncertainty_of_an_exponent_is_that_of_its_seeds() -> None:
    errors, spreads = [], []
    for i in range(20):
        fit = fit_exponent(by_tokens(-0.4, noise=0.1, seeds=(10 * i, 10 * i + 1, 10 * i + 2)))
        assert fit is not None and fit.slope.stderr is not None
        errors.append(fit.slope.low + 0.4)
        spreads.append(fit.slope.stderr)
    true = 0.1 / math.sqrt(3) / math.sqrt(5)  # of a mean of three seeds, of the slope of four points one apart
    assert np.std(errors) == pytest.approx(true, rel=0.5) and true / 2 < np.median(spreads) < 2 * true


def test_two_sizes_of_one_seed_prove_no_exponent() -> None:
    assert "so no uncertainty to compare with" in exponent_in_words(by_tokens(-0.5, seeds=(0,), sizes=(64, 128)))
    edge = by_tokens(-6.0, seeds=(0,), sizes=(64, 128))
    assert fit_exponent(edge) is None and "fewer than two optima" in exponent_in_words(edge)
    assert exponent_in_words(analyze(sweep())[0]) == ""
