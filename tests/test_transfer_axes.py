"""What a transfer report may say from little, from unequal grids, and over depth, tokens and batch size; its tables."""

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import RATES, make_run, sweep

from mutransformer.cli import main
from mutransformer.mup.checks.comparison import compare_tuned
from mutransformer.mup.checks.runs import short
from mutransformer.mup.checks.transfer import analyze
from mutransformer.mup.checks.transfer_verdicts import judge, transfers
from mutransformer.mup.checks.verdict import CheckError, Verdict, passed
from mutransformer.study import figures
from mutransformer.study.sweep.grid import SweepAxis
from mutransformer.study.sweep.records import AXES, FILE, Run, append, join, read
from mutransformer.study.transfer import tables
from mutransformer.study.transfer.page import page
from mutransformer.study.transfer.report import ended_in_warm_up, write

ROOT = Path(__file__).parents[1]


def verdicts(runs: list[Run], over: SweepAxis = "width", **options) -> str:
    found = judge(analyze(runs, axis=AXES[over], **options), runs, 0.5, ended_in_warm_up(runs))
    return "\n".join(map(str, found))


def without(runs: list[Run], width: int, *rates: float) -> list[Run]:
    return [run for run in runs if run.width != width or math.log2(run.lr) not in rates]


# Never a pass from too little


def test_three_rates_at_one_width_cannot_pass() -> None:
    four, three = (without(sweep(), 512, *[r for r in RATES if r not in kept]) for kept in ((-8, -7, -6, -5), (-7, -6, -5)))
    assert "PASS    mup: the learning rate transfers" in verdicts(four)
    found = verdicts(three)
    assert "UNKNOWN mup: undetermined whether the learning rate transfers" in found and "PASS    mup: the" not in found
    assert "only 3 learning rates at width 512, 4 are needed" in found
    assert transfers(analyze(three)[0], 10.0) is None  # whatever the bound
    drifting = without(sweep(optimum=lambda width: -6.2 + math.log2(width / 64) / 1.5), 512, -10, -9, -8, -7, -6)
    assert "FAIL    mup: the learning rate does not transfer" in verdicts(drifting)  # to fail, three can be enough


def test_runs_that_ended_within_their_warm_up_tell_nothing() -> None:
    def warming(steps: int) -> list[Run]:
        return [replace(run, settings=run.settings | {"optim.warmup_steps": steps}) for run in sweep()]

    assert verdicts(warming(199)).count("PASS") == 2 and not ended_in_warm_up(warming(199))
    found = verdicts(warming(200))
    assert found.count("UNKNOWN") == 2 and "PASS" not in found and "FAIL" not in found
    assert found.count("64 runs of 200 steps ended within the warm-up of 200 steps; set optim.warmup_steps to less") == 2
    default = [replace(run, steps=100) for run in sweep()]  # the default warm-up is 100 steps
    assert "ended within the warm-up of 100 steps" in verdicts(default)
    share = [replace(run, settings=run.settings | {"optim.warmup_fraction": 0.1}) for run in default]
    assert not ended_in_warm_up(share)
    assert "CONTROL mup is undetermined" in verdicts(warming(200) + sweep("other"), controls=["mup"])


def test_what_is_unknown_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", lambda *_, **__: None)
    append(tmp_path / FILE, without(sweep(), 512, -10, -9, -8, -4, -3))
    assert main(["report", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("UNKNOWN mup: ") and "FAIL" not in out
    assert passed([Verdict("PASS", ""), Verdict("CONTROL", ""), Verdict("WARNING", "")])
    for outcome in ("UNKNOWN", "FAIL"):
        assert not passed([Verdict(outcome, ""), Verdict("PASS", "")])
    assert not passed([Verdict("CONTROL", "")]) and not passed([])


# Grids that differ between widths


def test_a_narrower_grid_around_the_optimum_is_no_gap() -> None:
    runs = without(without(sweep(), 512, -10, -9, -4, -3), 256, -10)
    found = verdicts([run for run in runs if run.width < 512 or run.seed == 0])
    assert "missing" not in found and "PASS    mup: the learning rate transfers" in found
    edge = without(sweep(), 512, -10, -9, -5, -4, -3)  # the control: the optimum is not within it
    assert "not found at width 512: at the upper edge of its grid, 2^-6" in verdicts(edge)


def test_missing_runs_are_counted_and_named() -> None:
    runs = [run for run in without(sweep(), 128, -8) if run.key not in {("mup", 256, 2.0**-5, 1), ("mup", 64, 2.0**-10, 0)}]
    named = "width 64 at 2^-10 (seed 0); width 128 at 2^-8 (all seeds); width 256 at 2^-5 (seed 1)"
    assert f"WARNING mup: 4 runs of the grid missing: {named}" in verdicts(runs)
    assert "missing" not in verdicts(sweep())
    many = [run for run in sweep(widths=range(64, 1024, 64)) if run.key[1:] != (run.width, 2.0**-8, 1)]
    assert re.search(r"15 runs of the grid missing: (.*?;){6} and more at 9 other rates", verdicts(many))


def test_half_octaves_near_the_optimum_narrow_the_uncertainty() -> None:
    def skewed(rates: list[float]) -> list[Run]:
        points = [(width, rate, seed) for width in (64, 128) for rate in rates for seed in (0, 1)]
        curve = {rate: 5 + 0.2 * (math.exp(1.2 * (rate + 6.1)) / 1.2 + math.exp(-0.5 * (rate + 6.1)) / 0.5) for rate in rates}
        return [make_run("mup", width, rate, seed, curve[rate] + 0.01 * seed) for width, rate, seed in points]

    octaves = [float(rate) for rate in RATES]
    coarse, fine = (analyze(skewed(rates))[0].fits[64].optimum for rates in (octaves, sorted([*octaves, -6.5, -5.5])))
    assert coarse.grid and fine.grid and fine.grid < coarse.grid / 2
    assert abs(fine.low + 6.1) < abs(coarse.low + 6.1) < coarse.grid


# Other axes


def grown(over: SweepAxis, exponent: float, sizes: tuple[int, ...] = (8, 16, 32, 64)) -> list[Run]:
    """A sweep of one width, in which layers, steps or rows grow and the optimum follows their number to a power."""
    runs = []
    for size in sizes:
        settings = {"depth": {"model.n_layer": size}, "batch": {"data.batch_size": size}}.get(over, {})
        steps = 100 * size if over == "tokens" else 200
        for run in sweep(widths=[64], optimum=lambda _, size=size: -6 + exponent * math.log2(size / sizes[0])):
            runs.append(replace(run, steps=steps, settings=run.settings | settings))
    return runs


def test_sizes_come_from_settings_and_their_defaults() -> None:
    bare = replace(make_run("mup", 64, -6, 0, 4.0), settings={})
    assert {name: axis.size(bare) for name, axis in AXES.items()} == {
        "width": 64,
        "depth": 6,
        "batch": 16,
        "tokens": 200 * 16 * 256,
    }
    given = replace(bare, settings={"model.n_layer": 2, "data.batch_size": 4, "data.seq_len": 128}, steps=10)
    assert [AXES[name].size(given) for name in ("depth", "batch", "tokens")] == [2, 4, 10 * 4 * 128]
    assert [short(size) for size in (64, 4096, 131072, 2621440, 3 * 10**9)] == ["64", "4096", "131k", "2.62M", "3B"]


@pytest.mark.parametrize(
    ("over", "exponent", "words"),
    [
        ("tokens", -0.5, r"FAIL    mup: .* tokens 1.64M to 13.1M .*consistent with -0.5 \(Complete\(d\)P\); not with -0.3"),
        ("tokens", 0.0, r"PASS    mup: .*consistent with 0 \(no rule\); not with -0.5 \(Complete\(d\)P\), -0.3 \(Delphi\)"),
        ("batch", 0.5, r"FAIL    mup: .* batch sizes 8 to 64 .*consistent with 0.5 \(Complete\(d\)P\); not with 0 \(no"),
        ("depth", 0.0, r"PASS    mup: the learning rate transfers: .* over depths 8 to 64 \(at most 0.5 allowed\)$"),
    ],
)
def test_other_axes_are_judged(over: SweepAxis, exponent: float, words: str) -> None:
    runs = grown(over, exponent)
    found = verdicts(runs, over)
    assert re.search(f"^{words}", found, re.MULTILINE), found
    assert "wider" not in found and "its runs differ" not in found
    (variant,) = analyze(runs, axis=AXES[over])
    text = page([variant], runs, [], 0.5)
    assert f"is not judged over {over}" in text and "Wider is better" not in text and f"over {over}?" in text
    assert ("**Exponent**" in text) == (over != "depth")
    assert variant.drift.low == pytest.approx(3 * abs(exponent), abs=1e-9)
    mixed = [replace(run, settings=run.settings | {"optim.beta2": 0.9}) if i == 0 else run for i, run in enumerate(runs)]
    assert f"differ in more than {over}, learning rate and seed: optim.beta2" in verdicts(mixed, over)


def test_an_axis_that_does_not_grow_is_refused() -> None:
    with pytest.raises(CheckError, match=r"mup: one depth only \(6\): nothing to compare"):
        analyze(sweep(), axis=AXES["depth"])
    mixed = [replace(run, width=width) for width in (64, 128, 256, 512) for run in grown("depth", 0)]
    with pytest.raises(CheckError, match=r"mup: 4 runs of depth 8, learning rate 2\^-10, seed 0: they differ in something else"):
        analyze(mixed, axis=AXES["depth"])
    with pytest.raises(CheckError, match="runs of 200 and 300 steps"):
        analyze([*sweep()[1:], replace(sweep()[0], steps=300)])


def test_the_command_over_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    append(tmp_path / FILE, grown("tokens", -0.3))
    assert join([tmp_path]) == read(tmp_path)
    assert main(["report", str(tmp_path), "--over", "tokens"]) == 1
    out = capsys.readouterr().out
    assert "consistent with -0.3 (Delphi)" in out and "--over" not in out
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"transfer.png", "loss_against_rate.png", "report.md"}
    assert not (tmp_path / "report/loss_against_step.png").exists()
    assert main(["report", str(tmp_path)]) == 2 and "one width only (64)" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["transfer", "transfer_gpu", "ablations", "ablations_gpu"])
def test_the_committed_sweeps_are_read(folder: str) -> None:
    runs = read(ROOT / "results" / folder)
    variants = analyze(runs, axis=AXES["width"])
    assert all(len(variant.sizes) > 1 and variant.ordering is not None for variant in variants)
    assert any(verdict.outcome != "WARNING" for verdict in judge(variants, runs, 0.5, ended_in_warm_up(runs)))


# Tuned once against tuned at every size


def pair() -> list[Run]:
    """mup at 2^-6 best at every width; sp lower by 0.05, 0.02, -0.01, -0.04 nats where it is tuned, by seeds ± 0.01."""
    runs = []
    for at, width in enumerate((64, 128, 256, 512)):
        for rate in RATES:
            for seed, own in ((0, -0.01), (1, 0.0), (2, 0.01)):
                level = 5 - 0.3 * at
                runs.append(make_run("mup", width, rate, seed, level + 0.1 * (rate + 6) ** 2 + own / 2))
                runs.append(make_run("sp", width, rate, seed, level - 0.05 + 0.03 * at + 0.1 * (rate + 6 + at) ** 2 - own / 2))
    return runs


def test_a_transferred_rate_is_compared_with_tuning_at_every_width() -> None:
    found = compare_tuned(analyze(pair()))
    assert [(each.size, each.rate, each.other_rate) for each in found] == [(64 * 2**i, -6, -6 - i) for i in range(4)]
    assert [each.difference for each in found] == pytest.approx([0.05, 0.02, -0.01, -0.04])
    assert [each.stderr for each in found] == pytest.approx([0.01 / math.sqrt(3)] * 4)  # paired: own losses differ by own
    assert [each.vertex for each in found] == pytest.approx([each.other_loss for each in found])
    runs = pair()
    variants = analyze(runs, axis=AXES["width"])
    text = page(variants, runs, [], 0.5)
    assert "| 512 | 4.100 | 2^-9 | 4.140 | -0.0400 ± 0.0058 | 3 | 4.140 |" in text
    assert "mup at 2^-6, tuned at width 64 only, is better than sp tuned at each width at 1 and worse at 2 of 4 sizes" in text
    assert not compare_tuned(analyze(sweep()))
    assert [each.subject for each in compare_tuned(analyze(sweep() + sweep("other")))] == [
        "other"
    ] * 4  # the first is the control


def test_a_comparison_says_where_it_has_nothing() -> None:
    apart = [replace(run, seed=run.seed + 10) if run.variant == "sp" else run for run in without(pair(), 128, -6)]
    apart = [
        replace(run, validation_loss=None, status="diverged") if run.variant == "sp" and run.width == 512 else run
        for run in apart
    ]
    found = {each.size: each for each in compare_tuned(analyze(apart))}
    assert found[64].difference is None and found[64].seeds == 0 and found[64].other_loss == pytest.approx(4.95)
    assert found[128].loss is None and found[512].other_rate is None and found[512].other_loss == math.inf
    variants = analyze(apart, axis=AXES["width"])
    assert "needs two seeds that both have" in page(variants, apart, [], 0.5) and tables.latex(variants)


# Files


def test_tables_as_csv() -> None:
    runs = without(pair(), 512, -3) + [make_run("sp", 512, -3, 0, math.inf)]
    variants = analyze(runs)
    losses = list(csv.DictReader(io.StringIO(tables.losses_csv(variants))))
    assert len(losses) == 4 * len(RATES) * 2 - 1
    line = next(line for line in losses if (line["variant"], line["width"], line["log2_rate"]) == ("sp", "512", "-9"))
    assert float(line["loss"]) == pytest.approx(4.14) and float(line["std_seeds"]) == pytest.approx(0.005)
    assert (line["rate"], line["seeds"], line["diverged"], line["control"]) == (repr(2.0**-9), "3", "0", "1")
    assert (losses[-1]["loss"], losses[-1]["diverged"], losses[-1]["std_seeds"]) == ("inf", "1", "")
    optima = list(csv.DictReader(io.StringIO(tables.optima_csv(variants))))
    assert [float(line["low"]) for line in optima] == pytest.approx([-6, -6, -6, -6, -6, -7, -8, -9])
    assert optima[3]["zero_shot_penalty"] == "0" and float(optima[7]["zero_shot_penalty"]) == pytest.approx(0.9)
    assert optima[0]["why_no_optimum"] == "" and float(optima[0]["stderr_seeds"]) == pytest.approx(0)


def test_tables_as_latex() -> None:
    text = tables.latex(analyze([replace(run, variant="a_b & 5%") if run.variant == "mup" else run for run in pair()]))
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 3
    assert r"a\_b \& 5\%: validation loss" in text and "a_b" not in text
    assert r"512 & 4.100 & $2^{-9}$ & 4.140 & $-0.040 \pm 0.006$ \\" in text
    assert r"\textbf{4.100}" in text and r"$-6.00 \pm 0.00 \pm 0.05$" in text
    for table in re.findall(r"\\begin\{tabular\}\{(r+)\}\n(.*?)\\end", text, re.DOTALL):
        rows = [row for row in table[1].splitlines() if row.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(table[0])}
    edge = tables.latex(analyze(sweep(optimum=lambda width: -10.2)))
    assert r"$\le -9.50$" in edge


@pytest.mark.parametrize("runs", [pair(), sweep(widths=range(64, 1024, 64), seeds=[0]), sweep(diverges_above=lambda width: -20)])
def test_the_figure_of_one_panel_is_drawn(runs: list[Run], tmp_path: Path) -> None:
    write(runs, tmp_path, 0.5)
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "transfer.svg").stat().st_size > 5000
