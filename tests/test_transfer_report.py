"""The transfer report on sweeps with known numbers: what it computes, its verdicts and words, and the mistakes it refuses."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sweeps import LOGGED, RATES, WIDTHS, make_run, sweep

from mutransformer.cli import main
from mutransformer.mup.checks.optimum import LEAST, Bounds, locate, vertex
from mutransformer.mup.checks.transfer import Variant, analyze
from mutransformer.mup.checks.transfer_verdicts import judge, ordering_in_words, transfers
from mutransformer.mup.checks.verdict import CheckError
from mutransformer.mup.checks.width_ordering import WidthOrdering, WidthPair, compare_widths, training_losses
from mutransformer.study import figures
from mutransformer.study.sweep.records import AXES, FILE, Run, append
from mutransformer.study.transfer import curves
from mutransformer.study.transfer.page import page
from mutransformer.study.transfer.report import write

ROOT = Path(__file__).parents[1]
FAILS = "FAIL    mup: wider is not always better"
SCRIPT = ROOT / "scripts/transfer_report.py"


def only(runs: list[Run], **options) -> Variant:
    (variant,) = analyze(runs, **options)
    return variant


def ordering(variant: Variant) -> WidthOrdering:
    assert variant.ordering is not None
    return variant.ordering


def verdicts(runs: list[Run], max_drift: float = 0.5, **options) -> str:
    """The verdict lines, one below the other."""
    return "\n".join(map(str, judge(analyze(runs, axis=AXES["width"], **options), runs, max_drift)))


# Optimum


@pytest.mark.parametrize("x", [(-7.0, -6.0, -5.0), (-8.0, -6.0, -5.5)])
@pytest.mark.parametrize("at", [-6.3, -6.0, -5.9])
def test_a_parabola_is_found_exactly(x, at):
    y = [0.7 * (r - at) ** 2 + 4 for r in x]
    found, loss = vertex(x, (y[0], y[1], y[2]))
    assert found == pytest.approx(at, abs=1e-9) and loss == pytest.approx(4, abs=1e-9)


def test_three_equal_losses_have_no_vertex_to_divide_by():
    assert vertex((-2.0, -1.0, 0.0), (1.0, 1.0, 1.0)) == (-1.0, 1.0)


def test_optimum_drift_and_penalty_of_a_known_sweep():
    optimum = {64: -6.3, 128: -6.1, 256: -5.4, 512: -5.6}
    variant = only(sweep(optimum=optimum.__getitem__))
    assert {width: fit.optimum.low for width, fit in variant.fits.items()} == pytest.approx(optimum, abs=1e-9)
    assert all(fit.optimum.is_point and not fit.optimum.why for fit in variant.fits.values())
    assert variant.drift.low == variant.drift.high == pytest.approx(0.9, abs=1e-9)
    assert variant.signed_drift.low == variant.signed_drift.high == pytest.approx(0.7, abs=1e-9)
    assert variant.drift.stderr == pytest.approx(0, abs=1e-9) == variant.signed_drift.stderr
    assert not variant.same_best
    assert {width: fit.best for width, fit in variant.fits.items()} == {64: -6, 128: -6, 256: -5, 512: -6}
    assert variant.fits[512].penalty(variant.tuned) == 0.0
    assert variant.fits[256].penalty(variant.tuned) == pytest.approx(0.04 * (0.6**2 - 0.4**2), abs=1e-9)


def test_the_uncertainty_is_that_of_the_seeds_own_optima():
    own = {(64, 0): -6.2, (64, 1): -6.0, (64, 2): -6.1, (128, 0): -6.3, (128, 1): -5.9, (128, 2): -6.0}
    runs = [make_run("mup", width, rate, seed, 5 + 0.1 * (rate - at) ** 2) for (width, seed), at in own.items() for rate in RATES]
    variant = only(runs)
    assert variant.fits[64].optimum.low == pytest.approx(-6.1, abs=1e-9)  # the mean of the vertices
    assert variant.fits[64].optimum.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert variant.drift.low == pytest.approx(6.1 - 6.2 / 3 - 4.2 + 0.2, abs=0.1)
    paired = [own[128, seed] - own[64, seed] for seed in range(3)]
    assert variant.signed_drift.low == pytest.approx(np.mean(paired), abs=1e-9)
    assert variant.signed_drift.stderr == pytest.approx(np.std(paired, ddof=1) / math.sqrt(3))


def test_a_seed_without_an_optimum_of_its_own_leaves_no_uncertainty():
    own = {0: -9.4, 1: -9.4, 2: -9.6}  # the last one's best is the edge, and the mean's is not
    runs = [
        make_run("mup", width, rate, s, 5 + 0.1 * (rate - at) ** 2)
        for width in (64, 128)
        for s, at in own.items()
        for rate in RATES
    ]
    variant = only(runs)
    assert variant.fits[64].optimum.low == pytest.approx(np.mean(list(own.values())), abs=1e-9)
    assert variant.fits[64].optimum.stderr is None and variant.drift.stderr is None
    assert "no ± seeds: a single seed has no optimum" in page([variant], runs, [], 0.5)
    assert "WARNING mup: no standard error of the drift: a seed has no optimum of its own" in verdicts(runs)


def test_one_seed_has_no_uncertainty():
    runs = sweep(seeds=[0])
    variant = only(runs)
    assert {fit.optimum.stderr for fit in variant.fits.values()} == {None} and variant.drift.stderr is None
    assert "one seed: no uncertainties" in verdicts(runs) and "(seeds)" not in verdicts(runs)


def test_an_optimum_at_the_edge_cannot_pass():
    low = locate({-9.0: 4.0, -8.0: 4.1, -7.0: 4.4})
    assert low == Bounds(-math.inf, -8.5, loss=None, why="at the lower edge of its grid, 2^-9")
    high = locate({-9.0: 4.4, -8.0: 4.1, -7.0: 4.0})
    assert high == Bounds(-7.5, math.inf, why="at the upper edge of its grid, 2^-7")

    same = sweep(optimum=lambda width: -10.2)  # at every width, and yet nobody knows where
    variant = only(same)
    assert variant.same_best and not variant.drift.is_point and variant.drift.low == 0
    assert transfers(variant, 0.5) is None
    assert re.search(
        r"^UNKNOWN mup: undetermined .* transfers: the optimum may drift .*64: at the lower edge of its grid, 2\^-10, so ≤ -9.50",
        verdicts(same),
    )


def test_the_drift_to_an_edge_is_a_lower_bound():
    runs = sweep(optimum=lambda width: {64: -6.0, 128: -7.0, 256: -8.0, 512: -9.8}[width])
    variant = only(runs)
    assert variant.drift.low == pytest.approx(3.5) and variant.drift.high == math.inf  # from -6 down to -9.5 or less
    assert (variant.signed_drift.low, variant.signed_drift.high) == pytest.approx((-math.inf, -3.5))
    assert "FAIL    mup: the learning rate does not transfer: the optimum drifts at least 3.50 octaves" in verdicts(runs)
    assert "| 512 | ≤ -9.50 |  |  | -10 |" in page([variant], runs, [], 0.5)


def test_a_neighbour_that_diverged_leaves_bounds():
    diverged = locate({-8.0: 5.0, -7.0: 4.5, -6.0: 4.0, -5.0: math.inf})
    assert diverged == Bounds(-6.5, -5.0, why="its neighbor 2^-5 diverged")
    lost = locate(dict.fromkeys([-8.0, -7.0, -6.0, -5.0], math.inf))
    assert str(lost) == "unknown" and lost.why == "every run diverged"


def test_a_mean_with_a_diverged_seed_diverged():
    runs = sweep(seeds=[0, 1, 2])
    runs = [make_run("mup", 512, -6, 1, math.inf) if run.key == ("mup", 512, 2.0**-6, 1) else run for run in runs]
    variant = only(runs)
    assert variant.fits[512].cells[-6].mean == math.inf and variant.diverged == 1
    assert variant.fits[512].best == -7 and variant.fits[512].penalty(variant.tuned) == math.inf
    text = page([variant], runs, [], 0.5)
    assert "diverged (1 of 3)" in text and "3 seeds, 1 run diverged" in text
    assert "its neighbor 2^-6 diverged" in verdicts(runs)


def test_runs_that_diverged_above_the_optimum_harm_nothing():
    runs = sweep(diverges_above=lambda width: -4.5)
    variant = only(runs)
    assert variant.diverged == 2 * 2 * len(WIDTHS) and variant.drift.low < 1e-9
    assert "FAIL" not in verdicts(runs)


def test_a_smallest_width_that_always_diverged():
    runs = sweep(diverges_above=lambda width: -20 if width == 64 else 0)
    variant = only(runs)
    assert variant.tuned is None and ordering(variant).rate is None
    assert {fit.penalty(variant.tuned) for fit in variant.fits.values()} == {None}
    assert verdicts(runs).count("UNKNOWN") == 2 and "PASS" not in verdicts(runs)


# Verdicts of transfer


def test_a_drift_passes_or_fails_by_the_bound():
    runs, grid = sweep(optimum=lambda width: -6.2 + 0.3 * math.log2(width / 64)), math.hypot(LEAST, LEAST)
    words = f"the optimum drifts 0.90 ± 0.00 (seeds) ± {grid:.2f} (grid) octaves over widths 64 to 512"
    assert f"FAIL    mup: the learning rate does not transfer: {words}" in verdicts(runs)
    assert f"FAIL    mup: the learning rate does not transfer: {words}" in verdicts(runs, max_drift=0.9 - 2.1 * grid)
    for bound in (0.9 - 1.9 * grid, 0.9 + 1.9 * grid):
        assert f"UNKNOWN mup: undetermined whether the learning rate transfers: {words}" in verdicts(runs, max_drift=bound)
        assert "the grid is too coarse: add half-octave rates around the optima" in verdicts(runs, max_drift=bound)
    assert f"PASS    mup: the learning rate transfers: {words}" in verdicts(runs, max_drift=0.9 + 2.1 * grid)


def test_controls_decide_nothing_but_must_fail():
    drifting = sweep("sp", lambda width: -5.5 - math.log2(width / 64))
    found = verdicts(sweep() + drifting)
    assert "CONTROL sp does not transfer, as expected: the optimum drifts 3.00" in found
    assert "FAIL" not in found and "WARNING" not in found
    found = verdicts(sweep() + sweep("sp model.norm_scale=vector"))
    assert "CONTROL sp model.norm_scale=vector transfers, unexpectedly" in found
    assert "WARNING the control sp model.norm_scale=vector transfers as well: nothing shows that" in found
    found = verdicts(sweep() + sweep("other", lambda width: -5.5 - math.log2(width / 64)), controls=["other"])
    assert "CONTROL other does not transfer" in found and "FAIL" not in found
    assert "WARNING no control" in verdicts(sweep())
    assert "spare: the learning rate" in verdicts(sweep() + sweep("spare"))  # sp is a word, not a beginning


def test_what_weakens_a_verdict_is_told():
    runs = sweep()
    runs[5].settings["data.batch_size"] = 4
    assert "mup: its runs differ in more than width, learning rate and seed: data.batch_size" in verdicts(runs)


def test_seeds_added_at_one_rate_are_for_the_order_of_widths_only():
    tuned = ordering(analyze(sweep())[0]).rate
    assert tuned is not None

    def added(seeds: tuple[int, ...], shift: float) -> list[Run]:
        extra = [run for run in sweep(seeds=seeds) if run.lr == 2.0**tuned]
        return [replace(run, validation_loss=run.validation_loss + shift) for run in extra if run.validation_loss is not None]

    plain, more = analyze(sweep())[0], analyze(sweep() + added((7, 8), 5.0))[0]
    assert (more.fits, more.drift, more.seeds, more.missing) == (plain.fits, plain.drift, plain.seeds, plain.missing)
    assert {pair.seeds for pair in ordering(plain).pairs} == {2} and {pair.seeds for pair in ordering(more).pairs} == {4}
    assert f"mup: {more.off_grid} runs with seeds that were run at one or two" in verdicts(sweep() + added((7, 8), 5.0))
    alone = analyze([run for run in sweep() if run.seed == 0])[0]
    assert alone.off_grid == 0 and alone.seeds == [0]


# Wider is better


def trained(width_loss: Callable[[int, int, int], float], seeds=(0, 1, 2), rate: float = -6, **options) -> list[Run]:
    """A sweep whose training losses at one rate are width_loss(width, step, seed)."""
    runs = sweep(seeds=seeds, **options)
    for run in runs:
        if run.lr == 2.0**rate:
            run.train_loss[:] = [width_loss(run.width, step, run.seed) for step in run.logged]
    return runs


def falling(width: int, step: int, seed: int) -> float:
    batch = 0.3 * math.sin(step + 7 * seed)  # common to all widths: the pairing must take it away
    return 8 - math.log2(width) * (1 - math.exp(-step / 50)) / 4 + batch


def test_wider_is_better_where_seeds_share_their_batches():
    variant = only(trained(falling))
    found = ordering(variant)
    assert found.better and found.held == found.compared == 3 * len(LOGGED)
    for pair in found.pairs:
        assert pair.noise == pytest.approx(0, abs=1e-12) and pair.seeds == 3
        assert pair.difference == pytest.approx([-(1 - math.exp(-step / 50)) / 4 for step in LOGGED])


@pytest.mark.parametrize(("seeds", "found"), [((0,), "UNKNOWN mup: undetermined whether wider is better"), ((0, 1, 2), FAILS)])
def test_one_crossing_at_one_step_is_caught(seeds, found):
    def crossing(width: int, step: int, seed: int) -> float:
        return falling(width, step, seed) + (0.3 if (width, step) == (256, 51) else 0)

    runs = trained(crossing, seeds)
    assert "PASS    mup: wider" in verdicts(trained(falling, seeds))
    assert re.search(found + r" .*: in 59 of 60 .* step 51, width 256 minus 128: \+0.1\d+ nats", verdicts(runs))
    assert ("one seed allows none above 0: add seeds" in verdicts(runs)) == (len(seeds) == 1)


def test_twice_the_noise_is_the_bound():
    noise = np.array([0.1, 0.1, 0.1, 0.2])
    pair = WidthPair(64, 128, [1, 11, 21, 31], np.array([0.19, 0.21, math.inf, 0.39]), noise, 2)
    assert pair.holds.tolist() == [True, False, False, True] and pair.worst == 2
    assert WidthPair(64, 128, [1, 11], np.array([0.0, 1e-9]), np.zeros(2), 1).holds.tolist() == [True, False]


def test_equal_widths_are_seldom_called_worse():
    """The noise correlates by 0.9 from one logged step to the next, as in real runs: twice the noise would fail half of all."""

    def drawn(rng: np.random.Generator) -> np.ndarray:
        steps = np.empty((3, len(LOGGED)))
        for i in range(len(LOGGED)):
            steps[:, i] = rng.normal(size=3) if i == 0 else 0.9 * steps[:, i - 1] + math.sqrt(1 - 0.9**2) * rng.normal(size=3)
        return steps

    found = []
    for trial in range(200):
        rng = np.random.default_rng(trial)
        losses = [(width, seed, each) for width in WIDTHS for seed, each in enumerate(5 + 0.01 * drawn(rng))]
        runs = [replace(make_run("mup", width, -6, seed, 5.0), train_loss=each.tolist()) for width, seed, each in losses]
        found.append(compare_widths(runs, WIDTHS, -6.0))
    assert sum(each.better is False for each in found) <= 20  # 12 at 0.06; 20 or more at 0.06 have a chance of 1 %
    assert sum(each.held < each.compared for each in found) >= 80
    unsure = next(each for each in found if each.better is None)
    assert re.search(
        r"undetermined .* \(noise allows .*, chance explains up to \+0.\d+ nats: add seeds\)", ordering_in_words(unsure)
    )


def test_what_noise_explains_is_no_crossing():
    def noisy(size: float):
        return lambda width, step, seed: 5.0 + size * float(np.random.default_rng([width, step, seed]).normal()) - 1e-3 * width

    found = ordering(only(trained(noisy(0.01))))
    # Two widths' seeds, independent: variances add. 20 steps x 2 degrees of freedom give their mean to a fifth.
    assert math.sqrt(np.mean(found.pairs[0].noise ** 2)) == pytest.approx(0.01 * math.sqrt(2) / math.sqrt(3), rel=0.2)
    assert found.better
    worse = ordering(only(trained(lambda width, step, seed: 5.0 + 0.001 * width + noisy(0.001)(0, step, seed))))
    assert worse.held == 0


def test_noise_is_that_of_the_steps_nearby():
    """Ten times as large from step 61 to 101 as elsewhere: what it allows there it allows nowhere else."""

    def noisy(width: int, step: int, seed: int) -> float:
        size = 0.1 if 61 <= step <= 101 else 0.01
        return 5.0 - 2e-4 * width + size * float(np.random.default_rng([width, step, seed]).normal())

    runs = trained(noisy, tuple(range(6)))
    pair = ordering(only(runs)).pairs[0]
    expected = np.array([0.1 if 61 <= step <= 101 else 0.01 for step in LOGGED]) * math.sqrt(2 / 6)
    inside = np.array([61 < step < 101 for step in LOGGED])
    outside = np.array([not 51 <= step <= 111 for step in LOGGED])
    for where in (inside, outside):
        assert pair.noise[where] == pytest.approx(expected[where], rel=0.6)
    for step, better in ((81, True), (171, False)):

        def worse(width: int, at: int, seed: int, step: int = step) -> float:
            return noisy(width, at, seed) + (0.08 if (width, at) == (256, step) else 0)

        assert ordering(only(trained(worse, tuple(range(6))))).better is better


def test_a_wider_run_that_diverges_is_worse_and_a_narrower_one_is_not():
    runs = sweep(diverges_above=lambda width: -6.5 if width == 256 else 0)
    narrow, middle, wide = ordering(only(runs)).pairs
    assert narrow.holds.all() and not middle.holds[3:].any() and wide.holds[3:].all()
    assert "wider diverged" in verdicts(runs)
    both = ordering(only(sweep(diverges_above=lambda width: -6.5 if width > 128 else 0)))
    assert both.pairs[2].steps == LOGGED[:3]  # where both diverged there is nothing to compare


def test_losses_after_a_divergence_mean_nothing():
    run = make_run("mup", 64, -6, 0, math.inf, diverged_at=31)
    run.train_loss[:] = [5.0] * len(LOGGED)
    steps, losses = training_losses([run])
    assert steps.tolist() == LOGGED and losses.tolist() == [[5.0] * 3 + [math.inf] * (len(LOGGED) - 3)]


def test_the_rate_to_compare_at_can_be_chosen():
    assert ordering(only(sweep())).rate == -6 and ordering(only(sweep(), rate=-8.0)).rate == -8
    with pytest.raises(CheckError, match=r"--lr 2\^-8.5: mup has no run at it; there are: 2\^-10, "):
        analyze(sweep(), rate=-8.5)
    absent = [run for run in sweep() if (run.width, run.lr) != (256, 2**-8)]
    assert re.search(r"UNKNOWN mup: undetermined whether wider is better .*; no run at width 256", verdicts(absent, rate=-8.0))
    worse = [replace(run, train_loss=[9.0] * len(LOGGED)) if run.width == 512 else run for run in absent]
    assert re.search(r"FAIL    mup: wider is not always better .*; no run at width 256", verdicts(worse, rate=-8.0))
    apart = [run for run in sweep() if run.seed == (run.width == 64)]
    assert "widths 64 and 128 share no seed and step" in verdicts(apart)
    early, late = LOGGED[:2], LOGGED[2:]
    no_step = [make_run("mup", width, -6, seed, 5.0) for width in (64, 128) for seed in (0, 1)]
    no_step = [replace(run, logged=early if run.width == 64 else late) for run in no_step]
    no_step = [replace(run, train_loss=[5.0] * len(run.logged)) for run in no_step]
    found = compare_widths(no_step, (64, 128), -6.0)
    assert found.better is None and found.compared == 0 and "share no seed and step" in found.why


# The page


def test_the_page_has_what_a_reader_looks_for():
    runs = sweep(noise=0.01) + sweep("sp", lambda width: -5.5 - math.log2(width / 64)) + sweep("a|b model.n_kv_head=1")
    variants = analyze(runs, axis=AXES["width"])
    assert [variant.name for variant in variants] == ["mup", "a|b model.n_kv_head=1", "sp"]
    text = page(variants, runs, judge(variants, runs, 0.5), 0.5)
    assert re.match(r"# .*\n\n- \*\*PASS\*\* mup: the learning rate transfers", text)
    assert (
        "| variant | transfers | drift" in text
        and "## Tuned once against tuned at every size" in text
        and "## sp (control)" in text
        and r"a\|b model.n\_kv\_head=1" in text
    )
    assert re.search(r"\| 64 \| 5\.\d{3} ± 0\.\d{3} \|.* \| \*\*5\.\d{3} ± 0\.\d{3}\*\* \|", text)
    assert "- `data.seq_len` = 128" in text and "- sp: `optim.rule` = sp" in text and "model.d_model" not in text
    assert "\n| variant" not in page(variants[:2], runs, [], 0.5)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 12
    for table in tables:  # every row as wide as its head
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_the_same_runs_give_the_same_bytes(tmp_path):
    runs = sweep(noise=0.01) + sweep("sp", lambda width: -5.5 - math.log2(width / 64), diverges_above=lambda width: -4.5)
    for name in ("one", "two"):
        write(runs, tmp_path / name, 0.5)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    drawn = [f"{figure}.{kind}" for figure in ("loss_against_rate", "loss_against_step", "transfer") for kind in ("png", "svg")]
    assert names == sorted([*drawn, "losses.csv", "optima.csv", "report.md", "tables.tex"])
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / names[0]).read_bytes().startswith(b"\x89PNG")


def test_figures_show_the_losses_that_matter():
    variants = analyze(sweep() + [make_run("mup", 1024, rate, 0, 400.0 if rate == -3 else 3.0 + abs(rate + 6)) for rate in RATES])
    low, high = curves.loss_range(variants)
    assert low < 3.0 and 5.0 < high < 10
    assert curves.loss_range(analyze(sweep(diverges_above=lambda width: -20))) == (0, 1)


@pytest.mark.parametrize(
    "runs", [sweep(seeds=[0]), sweep(diverges_above=lambda width: -20), sweep("$x_{1}") + sweep() + sweep("sp")]
)
def test_odd_sweeps_can_be_drawn(runs, tmp_path):
    write(runs, tmp_path, 0.5)


# The command


def test_passing_and_failing_sweeps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_, **__: None)  # drawn in other tests
    append(tmp_path / "mup" / FILE, sweep())
    append(tmp_path / "sp" / FILE, sweep("sp", lambda width: -5.5 - math.log2(width / 64)))
    assert main(["report", str(tmp_path / "mup"), str(tmp_path / "sp" / FILE)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("PASS    mup: the learning rate transfers") and not err
    page = (tmp_path / "mup/report/report.md").read_text()
    assert all(line.split(maxsplit=1)[1] in page for line in out.splitlines()[:-1])
    out = tmp_path / "elsewhere"
    args = [str(tmp_path / "mup"), "--out", str(out), "--max-drift", "0.05", "--lr", "2^-7"]
    assert main(["report", *args, "--control", "mup"]) == 2
    append(tmp_path / "mup" / FILE, sweep("mup x=1", lambda width: -6.2 + 0.1 * math.log2(width)))
    assert main(["report", *args]) == 1
    assert "learning rate 2^-7" in (out / "report.md").read_text()


def mistakes() -> dict[str, tuple[list[Run] | None, list[str], str]]:
    return {
        "missing": (None, [], r"runs.jsonl: cannot read it: No such file or directory"),
        "one width": (sweep(widths=[64]), [], r"mup: one width only \(64\): nothing to compare"),
        "two rates": (sweep(rates=[-7, -6]), [], r"mup: 2 learning rates: an optimum needs at least 3"),
        "unequal": (sweep()[1:] + [make_run("mup", 64, -10, 0, 4.0, steps=300)], [], r"mup: runs of 200 and 300 steps"),
        "control": (sweep(), ["--control", "spp"], r"--control spp: no such variant; there are: mup"),
        "controls only": (sweep("sp"), [], r"nothing to judge: sp: only controls"),
        "drift": (sweep(), ["--max-drift", "-1"], r"--max-drift -1.0: must be 0 or more"),
        "rate": (sweep(), ["--lr", "0.3"], r"--lr 2\^-1.7\d*: mup has no run at it"),
        "out": (sweep(), ["--out", "/dev/null/report"], r"/dev/null/report: Not a directory"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_mistakes_are_one_line_and_exit_code_2(name, tmp_path, capsys):
    runs, args, message = mistakes()[name]
    if runs:
        append(tmp_path / FILE, runs)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(tmp_path), *args]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: .*\n", err) and re.search(message, err) and not out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rate_that_is_none(tmp_path, capsys):
    for text in ("0", "x", "2^-6,2^-7", "2^-7:2^-6:1"):
        assert main(["report", str(tmp_path), "--lr", text]) == 2
        assert re.fullmatch(rf"error: --lr {re.escape(text)}: .*\n", capsys.readouterr().err)


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    append(tmp_path / FILE, sweep())
    monkeypatch.delitem(sys.modules, "mutransformer.study.figures")
    monkeypatch.delattr("mutransformer.study.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: figures need matplotlib: pip install 'mutransformer[plots]'\n"
    assert not (tmp_path / "report").exists()


def test_the_command_itself_never_starts_jax(tmp_path):
    path = tmp_path / FILE
    append(path, sweep())
    # A JAX that cannot be imported: whoever tries ends in a traceback.
    (tmp_path / "jax.py").write_text("raise RuntimeError('JAX was imported')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, path], env=env, capture_output=True, text=True, timeout=50)

    done = command()
    assert done.returncode == 0 and not done.stderr and f"report: {tmp_path}/report/report.md\n" in done.stdout
    path.write_bytes(path.read_bytes()[:-30])
    done = command()
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(rf"error: .*{FILE}:64: truncated line; re-run the sweep to repair it\n", done.stderr)
