"""The coordinate check: its measurements, slopes and verdicts, and that it fails for a wrong parametrization."""

import csv
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from programs import program, specs
from short_runs import ROOT, finish, refuse_before_jax, settings, start

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import train_batches
from mutransformer.data.cache.prepare import prepare
from mutransformer.errors import FAILED, FINISHED, USAGE_ERROR
from mutransformer.model.ops import shift_right
from mutransformer.model.weights import Transformer
from mutransformer.mup.checks.slopes import (
    ACTIVATIONS,
    KINDS,
    Axis,
    Coordinate,
    Expected,
    Kind,
    SlopeFit,
    csv_text,
    fit_slopes,
    judge,
    slope_table,
)
from mutransformer.sharding import devices as hardware
from mutransformer.sharding.spec import Weight
from mutransformer.study import coordinates, figures
from mutransformer.study.coordinates import expected_slopes, measure
from mutransformer.study.sweep.grid import VariantConfig
from mutransformer.training.program import Program

SCRIPT = "scripts/coord_check.py"
BOS = 1


# Slopes


Law = Callable[[Kind, str, int, int], float]  # (kind, name, step, seed) -> exponent

WEIGHTS = ("blocks.w_q", "blocks.attn_norm")
EXPECTED = Expected({"logits": -0.5}, {"blocks.w_q": -1.0}, vectors=frozenset({"blocks.attn_norm"}))


def synthetic(
    law: Law, variant: str = "mup", at: Sequence[int] = (64, 128, 256, 512), steps: int = 3, seeds: int = 3
) -> list[Coordinate]:
    """0.7 x at ^ law, of every activation and two weights, of which only the first decays."""
    found = []
    for kind in KINDS:
        for name in ACTIVATIONS if kind in ("size", "change") else WEIGHTS:
            for step in range(0 if kind == "size" else 1, steps + 1):
                for size in at:
                    factor = 0.0 if (kind, name) == ("decay", "blocks.attn_norm") else 0.7
                    values = [factor * float(size) ** law(kind, name, step, seed) for seed in range(seeds)]
                    found += [Coordinate(variant, size, s, step, kind, name, value) for s, value in enumerate(values)]
    return found


def right(kind: Kind, name: str, step: int, seed: int = 0) -> float:
    """The exponents of muP."""
    return -1.0 if (kind, name) == ("update", "blocks.w_q") else -0.5 if (kind, name, step) == ("size", "logits", 0) else 0.0


def only(found: Sequence[SlopeFit], kind: Kind, name: str, step: int) -> SlopeFit:
    (line,) = (line for line in found if (line.kind, line.name, line.step) == (kind, name, step))
    return line


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    for exponent in (-1.0, -0.5, 0.0, 0.03, 1.0):
        for line in (fit for fit in fit_slopes(synthetic(lambda *_, exponent=exponent: exponent)) if any(fit.means)):
            assert line.slope == pytest.approx(exponent, abs=1e-12) and line.spread == pytest.approx(0, abs=1e-12)
            assert line.at == [64, 128, 256, 512] and line.means == pytest.approx([0.7 * a**exponent for a in line.at])
            assert line.growth == pytest.approx(8**exponent) and line.ratio == pytest.approx(8 ** abs(exponent))


def test_spread_is_over_seed_slopes_and_slope_is_of_means() -> None:
    (line,) = fit_slopes(
        [Coordinate("v", a, s, 0, "size", "final", float(a) ** p) for a in (4, 16) for s, p in enumerate((0, 1))]
    )
    assert line.spread == pytest.approx(math.sqrt(0.5)) and line.means == [2.5, 8.5]
    assert line.slope == pytest.approx(math.log(8.5 / 2.5, 4)) and line.stderr == pytest.approx(0.5)
    (line,) = fit_slopes([Coordinate("v", a, 5, 0, "size", "final", float(a)) for a in (16, 4)])
    assert line.spread is None and line.stderr == 0 and line.at == [4, 16]


def test_the_standard_error_is_that_of_all_steps() -> None:
    """The spread of one step is itself uncertain: of three seeds it may be small by chance."""
    slopes = {0: (0.0, 0.0, 0.0), 1: (-0.3, 0.0, 0.3)}  # by step: the seeds'
    points = [(step, s, p) for step, by_seed in slopes.items() for s, p in enumerate(by_seed)]
    found = fit_slopes([Coordinate("v", a, s, step, "size", "key", float(a) ** p) for step, s, p in points for a in (4, 16)])
    assert [line.spread for line in found] == pytest.approx([0, 0.3])
    assert [line.stderr for line in found] == pytest.approx([math.sqrt(0.3**2 / 3 / 2)] * 2)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_zero_or_nonfinite_values_have_no_slope(value: float) -> None:
    found = [Coordinate("v", a, s, 0, "size", "final", value if (a, s) == (8, 1) else 1.0) for a in (4, 8) for s in (0, 1)]
    (line,) = fit_slopes(found)
    assert math.isnan(line.spread or 0)
    assert line.slope == pytest.approx(-1) if value == 0 else math.isnan(line.slope)  # a mean over seeds that is not zero
    (line,) = fit_slopes([c for c in found if c.seed == 1])
    assert math.isnan(line.slope) and line.ratio == math.inf
    assert line.growth == (0 if value == 0 else math.inf)


def test_fits_are_ordered_as_in_the_forward_pass_and_printed() -> None:
    found = fit_slopes(synthetic(lambda *_: 0.25, "sp", steps=2)[::-1] + synthetic(lambda *_: 0.0, steps=2))
    assert list(dict.fromkeys((fit.variant, fit.kind, fit.name) for fit in found)) == [
        (variant, kind, name)
        for variant in ("sp", "mup")
        for kind in KINDS
        for name in (ACTIVATIONS if kind in ("size", "change") else WEIGHTS[:: -1 if variant == "sp" else 1])  # as given
    ]
    head, *rows = slope_table(found, "width").splitlines()
    assert re.fullmatch(r"slope over width +step 0 +step 1 +step 2 *", head)
    assert rows[0].split("  ")[0].strip() == "sp" and re.search(r"size +residual( +\+0.250 ± 0.000){3}", rows[0])
    assert re.search(r"change +residual {15,}\+0.250 ± 0.000 +\+0.250 ± 0.000", rows[len(ACTIVATIONS)])
    assert len(rows) == 2 * (2 * len(ACTIVATIONS) + 2 * len(WEIGHTS))


# Verdicts


def verdict_lines(
    subject: Law,
    control: Law | None = lambda *_: 1.0,
    axis: Axis = "width",
    at: Sequence[int] = (64, 256, 1024),
    max_slope: float = 0.25,
) -> list[str]:
    against = [] if control is None else synthetic(control, "sp", at)
    found = fit_slopes([*synthetic(subject, at=at), *against])
    return [str(verdict) for verdict in judge(found, EXPECTED, "mup", None if control is None else "sp", axis, max_slope)]


def off(kind: Kind, name: str, step: int, by: float) -> Law:
    """Right but for one slope."""
    return lambda k, n, s, seed: right(k, n, s) + (by if (k, n, s) == (kind, name, step) else 0.0)


def test_the_right_slopes_and_a_growing_control_pass() -> None:
    flat, control = verdict_lines(off("change", "key", 2, 0.2))
    n = 14 * 3 + 14 * 2 + 2 * 3 + 3  # sizes after 0, 2 and 3 updates; changes from 2 on; updates; decay
    limit = "within ±0.25 and two standard errors"
    assert flat == (
        f"PASS    mup: {n} slopes over widths 64 to 1024 are as expected, {limit}; the furthest: change of key after 2 updates: "
        "+0.200 ± 0.000"
    )
    assert re.fullmatch(
        r"PASS    the control sp grows, as it should: \w+ changes 16.0 times as much at .* after 3 updates .*", control
    )


@pytest.mark.parametrize("by", [0.3, -0.3, math.nan])
@pytest.mark.parametrize(
    ("kind", "name", "step", "expected"),
    [
        ("size", "query", 0, 0.0),
        ("size", "logits", 0, -0.5),
        ("change", "key", 2, 0.0),
        ("change", "final", 3, 0.0),
        ("update", "blocks.w_q", 1, -1.0),
        ("update", "blocks.attn_norm", 3, 0.0),
        ("decay", "blocks.w_q", 2, 0.0),
    ],
)
def test_one_wrong_slope_fails_and_is_named(kind: Kind, name: str, step: int, expected: float, by: float) -> None:
    told, _ = verdict_lines(off(kind, name, step, by))
    n = 3 if math.isnan(by) and (kind, name) == ("size", "logits") else 1  # later sizes are predicted from the start
    assert told.startswith(
        f"FAIL    mup: {n} of 79 slopes over widths 64 to 1024 are not as expected, by more than ±0.25 and two"
    )
    assert f"the furthest: {kind} of {name} " in told and f"{expected + by:+.3f}" in told
    assert (f"where {expected:+.2f} is expected" in told) == (expected != 0)
    if not math.isnan(by):
        assert verdict_lines(off(kind, name, step, by), max_slope=0.35)[0].startswith("PASS")


def test_noise_is_allowed_for_and_no_more_than_noise() -> None:
    def noisy(mean: float) -> str:
        def law(kind: Kind, name: str, step: int, seed: int) -> float:
            return right(kind, name, step) + (mean + (-0.05, 0.0, 0.05)[seed] if name == "key" else 0.0)

        return verdict_lines(law, at=(64, 128))[0]

    two = 2 * 0.05 / math.sqrt(3)
    assert noisy(0.25 + 0.7 * two).startswith("PASS") and noisy(0.25 + 1.3 * two).startswith("FAIL")


def test_what_the_start_contributes_is_predicted() -> None:
    """Logits that start at 1 / sqrt(M) and then learn: the slope of their size goes from -1/2 to 0."""
    start, learned = 1.0, 0.05

    def found(learns: float) -> list[Coordinate]:
        at = [c for c in synthetic(right) if c.name != "logits"]
        for size in (64, 128, 256, 512):
            first, change = start * size**-0.5, learned * float(size) ** learns
            values = {("size", 0): first, ("change", 2): change, ("change", 3): change}
            values |= {("size", step): math.hypot(first, change) for step in (2, 3)}
            at += [Coordinate("mup", size, s, step, k, "logits", v) for (k, step), v in values.items() for s in range(3)]  # type: ignore
        return at

    fits = fit_slopes(found(0.0))
    steepest = min(fit.slope for fit in fits if fit.name == "logits" and fit.step > 1)
    assert -0.45 < steepest < -0.25, "by itself it would fail"
    assert judge(fits, EXPECTED, "mup", None, "width")[0].outcome == "PASS"
    assert judge(fits, EXPECTED._replace(start={}), "mup", None, "width")[0].outcome == "FAIL"
    assert judge(fit_slopes(found(-0.5)), EXPECTED, "mup", None, "width")[0].outcome == "FAIL", "nothing is learned"


def test_a_readout_may_start_anywhere_between_constant_and_a_random_sum() -> None:
    expected = EXPECTED._replace(start={}, readouts=frozenset({"logits"}))
    for by, outcome in ((0.5, "PASS"), (0.2, "PASS"), (0.0, "PASS"), (0.8, "FAIL"), (-0.3, "FAIL")):
        fits = fit_slopes(synthetic(off("size", "logits", 0, by)))
        assert judge(fits, expected, "mup", None, "width")[0].outcome == outcome, by


def test_what_the_first_update_changes_is_not_judged() -> None:
    assert verdict_lines(off("change", "query", 1, -1.0))[0].startswith("PASS")
    assert verdict_lines(off("size", "query", 1, -1.0))[0].startswith("PASS")


def test_zero_sizes_and_first_updates_are_not_judged_but_later_zeros_are() -> None:
    def zero(kind: Kind, name: str, steps: Sequence[int]) -> str:
        found = synthetic(right)
        at = [dataclasses.replace(c, value=0.0) if (c.kind, c.name) == (kind, name) and c.step in steps else c for c in found]
        return judge(fit_slopes(at), EXPECTED, "mup", None, "width")[0].outcome

    assert zero("size", "query", [0]) == "PASS"  # model.q_init=zero
    assert zero("update", "blocks.w_q", [1]) == "PASS"  # behind a weight that starts at zero
    assert zero("decay", "blocks.w_q", [1, 2, 3]) == "PASS"
    assert zero("update", "blocks.w_q", [1, 2, 3]) == "PASS"  # and that behind others
    assert zero("change", "query", [2, 3]) == "FAIL"
    late = [dataclasses.replace(c, value=0.0) if c.kind == "update" and c.step == 4 else c for c in synthetic(right, steps=4)]
    assert judge(fit_slopes(late), EXPECTED, "mup", None, "width")[0].outcome == "FAIL"


def test_gains_that_decay_are_a_warning() -> None:
    found = synthetic(right)
    assert [v.outcome for v in judge(fit_slopes(found), EXPECTED, "mup", None, "width")] == ["PASS", "WARNING"]
    decaying = [dataclasses.replace(c, value=0.1) if (c.kind, c.name) == ("decay", "blocks.attn_norm") else c for c in found]
    lines = [str(verdict) for verdict in judge(fit_slopes(decaying), EXPECTED, "mup", None, "width")]
    assert lines[1] == "WARNING mup: weight decay also shrinks gains and biases: blocks.attn_norm"


@pytest.mark.parametrize("at", [(64, 128), (64, 256, 1024)])
def test_a_control_must_grow_with_the_range_and_none_is_a_warning(at: Sequence[int]) -> None:
    def control(law: Law | None) -> str:
        return verdict_lines(right, law, at=at)[1]

    assert control(lambda *_: 0.49).startswith("FAIL    the control sp does not grow: ")
    assert control(lambda *_: 0.51).startswith("PASS")
    assert control(lambda *_: -math.inf).startswith("FAIL"), "nothing has changed at any width"
    assert control(lambda *_: math.nan).startswith("FAIL"), "it has diverged at every width"
    # Its size does not count, nor what it did before the last step.
    assert control(lambda kind, name, step, _: float(kind == "size" or step < 3)).startswith("FAIL")
    assert control(None).startswith("WARNING no control")


def test_depth_is_judged_by_the_final_residual_stream() -> None:
    def final(exponent: float) -> Law:
        return lambda kind, name, *_: exponent if (kind, name) == ("size", "final") else 0.9

    depths = (2, 8, 32)
    flat, control = verdict_lines(final(0.3), final(0.9), "depth", depths)  # 16x the depth: 2.3 and 12.1 times
    assert flat.startswith(
        "PASS    mup: the final residual stream is flat over depths 2 to 32: largest / smallest size at most 2.30"
    )
    assert control.startswith("PASS    the control sp grows, as it should: the final residual stream is 12.1 times as large")
    for deep in (depths, (2, 4)):  # the limits follow the range
        assert verdict_lines(final(-0.3), None, "depth", deep)[0].startswith("PASS")
        for exponent in (0.35, -0.35, math.nan):
            assert verdict_lines(final(exponent), None, "depth", deep)[0].startswith("FAIL")
        assert verdict_lines(final(0.0), final(0.8), "depth", deep)[1].startswith("FAIL")
        assert verdict_lines(final(0.0), final(0.9), "depth", deep)[1].startswith("PASS")
    at_the_end = synthetic(lambda *_: 0.0, at=depths)
    at_the_end = [dataclasses.replace(c, value=math.nan) if (c.at, c.step) == (32, 3) else c for c in at_the_end]
    assert judge(fit_slopes(at_the_end), EXPECTED, "mup", None, "depth")[0].outcome == "FAIL", "the deepest has diverged"


def test_the_slopes_that_are_expected_of_a_config() -> None:
    def of(*args: str) -> tuple[float, dict[str, float]]:
        config = load([*TINY, "model.norm_scale=vector", "model.d_base=64", *args])
        expected = expected_slopes(config, specs(config))
        assert {"blocks.attn_norm", "blocks.mlp_norm", "final_norm"} == expected.vectors
        return expected.start.get("logits", 0.0), dict(expected.update)

    start, update = of()  # at the base width, where every factor is 1: the slopes do not come from the factors
    assert start == -0.5 and [update[n] for n in ("embed", "blocks.w_q", "blocks.w_down", "unembed")] == [0, -1, -1, -1]
    assert update["final_norm"] == 0 and of("model.unembed_init=base") == (-0.5, update)
    assert of("model.unembed_init=sp") == (0.0, update) and of("optim.rule=sp") == (0.0, update)
    assert of("optim.rule=mup_table8") == (-0.5, update | {"unembed": 0.0}), "its output is multiplied by P / M"
    assert of("optim.name=muon")[1] == update | {n: -0.75 for n, slope in update.items() if slope == -1 and n != "unembed"}


def read_csv(path: Path) -> list[Coordinate]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    convert = {"at": int, "seed": int, "step": int, "value": float}
    return [Coordinate(**{key: convert.get(key, str)(value) for key, value in row.items()}) for row in rows]  # type: ignore


def test_odd_numbers_can_be_drawn_and_written(tmp_path: Path) -> None:
    odd = [0.0, math.nan, math.inf, 1e-30]
    found = [
        dataclasses.replace(c, value=odd[i % 7] if i % 7 < 4 else c.value)
        for i, c in enumerate([*synthetic(lambda *_: 1.0), *synthetic(lambda *_: 0.0, "sp")])
    ]
    found += [Coordinate("mup", a, 0, 1, "update", "all_zero", 0.0) for a in (64, 128)]
    for kind in ("size", "update"):
        of = [fit for fit in fit_slopes(found) if fit.kind == kind]
        figures.save(figures.coordinates, of, "mup", "sp", "width", path=tmp_path / kind)
        assert (tmp_path / f"{kind}.png").stat().st_size > 10_000 and "</svg>" in (tmp_path / f"{kind}.svg").read_text()
    (tmp_path / "c.csv").write_text(csv_text(found))
    again = read_csv(tmp_path / "c.csv")
    assert [dataclasses.replace(c, value=0.0) for c in again] == [dataclasses.replace(c, value=0.0) for c in found]
    np.testing.assert_allclose([c.value for c in again], [c.value for c in found], rtol=1e-5)


# Activations


TINY = [
    "model.d_model=64",
    "model.d_base=32",
    "model.d_head=8",
    "model.n_layer=2",
    "model.n_vocab=250",
    "data.seq_len=16",
    "data.batch_size=4",
    "precision.compute=float32",
]
MODELS = {
    "relu": [],
    "all options": [
        "model.activation=swiglu",
        "model.n_kv_head=2",
        "model.qk_norm=true",
        "model.norm_scale=vector",
        "model.biases=true",
        "model.embed_norm=true",
        "model.remat=full",
    ],
    "grouped heads, swiglu": ["model.n_kv_head=4", "model.activation=swiglu", "optim.rule=completep", "model.n_layer_base=1"],
}


def weights(config: Config) -> Transformer:
    """In which no gain is one and no bias zero."""

    def draw(path: tuple, w: Weight) -> np.ndarray:
        rng = np.random.default_rng(crc32(jax.tree_util.keystr(path).encode()))
        scale = w.fan_in**-0.5 if w.is_matrix else 0.3
        return (scale * rng.standard_normal(w.shape) + ("gain" in w.role)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, specs(config))


def rows(config: Config) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (config.data.batch_size, config.data.seq_len), dtype=np.int32)


def sizes_on(program: Program) -> Callable[[Transformer, Any], dict[str, jax.Array]]:
    """A function of (weights, tokens) -> mean |x| of every activation, as the check takes it."""
    forward = program.forward

    def look(params: Transformer, tokens: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(coordinates._mean_abs, forward.intermediates(params, shift_right(tokens, program.bos_id), None))

    in_specs = (forward.pspecs, PartitionSpec("x"))
    return jax.jit(jax.shard_map(look, mesh=program.mesh, in_specs=in_specs, out_specs=PartitionSpec()))


@cache
def sizes(model: str, x: int, y: int) -> dict[str, float]:
    config = load([*TINY, *MODELS[model], f"mesh.x={x}", f"mesh.y={y}"])
    look = sizes_on(program(config, jax.devices()[: x * y], BOS))
    return {name: float(value) for name, value in look(weights(config), rows(config)).items()}


@pytest.mark.parametrize("model", ["all options", pytest.param("grouped heads, swiglu", marks=pytest.mark.slow)])
def test_sizes_are_the_same_on_a_mesh(model: str) -> None:
    ours, theirs = sizes(model, 2, 4), sizes(model, 1, 1)
    assert set(ours) == set(theirs) == set(ACTIVATIONS)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(set(theirs.values())) == len(theirs), "two names are one thing"


def test_sizes_equal_those_of_the_model_in_numpy() -> None:
    """By NumPy, for the plainest model: no gains, biases or normed queries."""
    config = load(TINY)
    w, tokens = weights(config), rows(config)
    n, t, d = config.model.n_head, 16, 8
    cos, sin = (f(np.arange(t)[:, None] / 10000.0 ** (np.arange(4) / 4))[:, None] for f in (np.cos, np.sin))

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)

    def turn(x: np.ndarray) -> np.ndarray:
        low, high = x[..., :4], x[..., 4:]
        return np.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)

    seen: dict[str, list[np.ndarray]] = {name: [] for name in ACTIVATIONS}
    x = w.embed[np.concatenate([np.full((4, 1), BOS), tokens[:, :-1]], axis=1)]
    for i in range(2):
        seen["residual"].append(x)
        q, k, v = (np.einsum("btm,mhd->bthd", norm(x), m[i]) for m in (w.blocks.w_q, w.blocks.w_k, w.blocks.w_v))
        for name, z in (("query", q), ("key", k), ("value", v), ("rotated_query", turn(q)), ("rotated_key", turn(k))):
            seen[name].append(z)
        logits = np.einsum("bthd,bshd->bhts", turn(q), turn(k)) / d
        causal = np.tril(np.ones((t, t), bool))
        seen["attention_logits"].append(logits[:, :, causal])
        share = np.where(causal, np.exp(logits), 0)
        o = np.einsum("bhts,bshd->bthd", share / share.sum(axis=-1, keepdims=True), v)
        branch = np.einsum("bthd,hdm->btm", o, w.blocks.w_o[i])
        seen["attention_output"].append(o)
        seen["attention_branch"].append(branch)
        x = x + branch
        hidden = norm(x) @ w.blocks.w_up[i]
        branch = np.maximum(hidden, 0) @ w.blocks.w_down[i]
        for name, z in (("hidden", hidden), ("activation", np.maximum(hidden, 0)), ("branch", branch)):
            seen[f"feed_forward_{name}"].append(z)
        x = x + branch
    seen["final"].append(x)
    seen["logits"].append(norm(x) @ w.unembed)
    assert w.blocks.w_q.shape == (2, 64, n, d)
    want = {name: float(np.mean([np.mean(np.abs(z)) for z in found])) for name, found in seen.items()}
    assert sizes("relu", 1, 1) == pytest.approx(want, rel=1e-4)


def test_activations_are_computed_only_on_request() -> None:
    config = load([*TINY, *MODELS["all options"]])
    built = program(config, jax.devices()[:1])
    forward = built.forward

    def equations(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                yield from equations(inner) if hasattr(inner, "eqns") else ()

    def computed(keep: Any) -> tuple[int, int]:
        """The number of arrays that the loop over layers stacks, and of matrix products."""

        def final(params: Transformer, inputs: Any) -> Any:
            x, kept = forward.apply_layers(params, inputs, None, keep)
            return forward.final_hidden(params, x), kept

        at = {"mesh": built.mesh, "in_specs": (forward.pspecs, PartitionSpec("x")), "out_specs": PartitionSpec()}
        traced = jax.make_jaxpr(jax.shard_map(final, **at, check_vma=False))(weights(config), rows(config))
        found = list(equations(traced.jaxpr))
        (loop,) = (equation for equation in found if equation.primitive.name == "scan")
        inner = getattr(loop.params["jaxpr"], "jaxpr", loop.params["jaxpr"])
        stacked = sum(out.aval.ndim > one.aval.ndim for out, one in zip(loop.outvars, inner.outvars, strict=True))
        return stacked, sum(e.primitive.name == "dot_general" for e in found)

    stacked, products = computed(None)
    assert stacked == 0
    assert computed(lambda seen: seen) == (len(ACTIVATIONS) - 3, products)  # without attention's logits, final and logits


# Measuring


@pytest.mark.slow
def test_a_negligible_update_changes_nothing(tmp_path: Path) -> None:
    """And the sizes are those of the model that training with this seed starts with, on its first batch."""
    config = load(settings(tmp_path, *TINY, "model.n_vocab=null", "optim.lr=1e-30", "optim.warmup_steps=0"))
    corpus = prepare(config.data)
    config = config.with_vocab(corpus.tokenizer.n_vocab)
    found, _ = measure(VariantConfig("still", config), 64, [7, 2], 2, corpus)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(specs(config))
    ]
    assert {(c.kind, c.step): [] for c in found}.keys() == {
        *[("size", step) for step in (0, 1, 2)],
        *[(kind, step) for kind in ("change", "update") for step in (1, 2)],
    }
    assert {c.name for c in found if c.kind == "update"} == set(names)
    assert all(c.value == 0 for c in found if c.kind != "size")
    built = program(config, jax.devices()[:1], corpus.tokenizer.bos_id)
    look = sizes_on(built)
    for seed in (7, 2):
        with closing(train_batches(corpus.splits["train"], config.data, seed, 1, (0,), config.model.n_vocab or 0)) as batches:
            tokens = next(batches).tokens
        want = look(program(dataclasses.replace(config, seed=seed), built.mesh).init_state().params, tokens)
        for step in (0, 1, 2):
            ours = {c.name: c.value for c in found if (c.kind, c.seed, c.step) == ("size", seed, step)}
            assert ours == pytest.approx({name: float(value) for name, value in want.items()}, rel=1e-5)


# The command


CHECK = ["model.d_base=64", "model.n_layer=1", "data.seq_len=32", "data.batch_size=1", "optim.warmup_steps=0"]
OPTIONS = ["--widths", "64,512", "--seeds", "0,1", "--steps", "3"]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command within this process; gives the exit code."""
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)  # a setting of the whole process

    def run(*args: str) -> int:
        return main(["coord-check", *args])

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coord")


@pytest.fixture(scope="module")
def told(folder: Path) -> str:
    """What a real check of two widths prints, in which everything passes."""
    args = [*settings(folder, *CHECK), *OPTIONS, "--out", str(folder / "out")]
    return finish(start(SCRIPT, args, devices=2, quick=True))


def printed_verdicts(out: str) -> list[str]:
    return re.findall("^(?:PASS|FAIL|WARNING).*$", out, re.MULTILINE)


@pytest.mark.slow
def test_the_command_writes_tables_figures_and_verdicts(told: str, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flat, control = printed_verdicts(told)
    n = 14 * 3 + 14 * 2 + 8 * 3
    assert flat.startswith(
        f"PASS    mup: {n} slopes over widths 64 to 512 are as expected, within ±0.25 and two standard errors; "
    )
    assert control.startswith("PASS    the control sp grows, as it should: ")
    assert told.endswith(f"results: {folder / 'out'}\n")
    assert "slope over width" in told and re.search(r"^mup +size +query +[+-]0\.\d{3} ± 0\.\d{3} ", told, re.MULTILINE)
    found = read_csv(folder / "out" / coordinates.TABLE)
    assert {(c.variant, c.at, c.seed) for c in found} == {(v, a, s) for v in ("mup", "sp") for a in (64, 512) for s in (0, 1)}
    assert len(found) == 8 * ((4 + 3) * len(ACTIVATIONS) + 3 * 8)
    expected = expected_slopes(config := load(settings(folder, *CHECK, "model.n_vocab=256")), specs(config))
    assert [str(v) for v in judge(fit_slopes(found), expected, "mup", "sp", "width")] == [flat, control]
    for kind in ("size", "change", "update"):  # nothing decays
        assert (folder / "out" / f"coordinates_{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "out" / f"coordinates_{kind}.svg").read_text().rstrip().endswith("</svg>")
    boards = folder / "out" / "tensorboard"
    assert {path.name for path in boards.iterdir()} == {"mup 64", "mup 512", "sp 64", "sp 512", "figures"}
    of = [c for c in found if (c.variant, c.at, c.kind, c.name) == ("mup", 512, "change", "logits")]
    means = {step: np.mean([c.value for c in of if c.step == step]) for step in (1, 2, 3)}
    curve = EventAccumulator(str(boards / "mup 512")).Reload().Scalars("change/logits")
    assert {e.step: e.value for e in curve} == pytest.approx(means, rel=1e-4)
    shown = EventAccumulator(str(boards / "figures")).Reload()
    assert set(shown.Tags()["images"]) == {f"coordinates/{kind}" for kind in ("size", "change", "update")}


@pytest.mark.slow
def test_the_first_adam_update_is_the_scaled_learning_rate(told: str, folder: Path) -> None:
    found = read_csv(folder / "out" / coordinates.TABLE)
    for variant, at, share in (("mup", 64, 1), ("mup", 512, 1 / 8), ("sp", 64, 1), ("sp", 512, 1)):
        for seed in (0, 1):
            (moved,) = (
                c.value for c in found if (c.variant, c.at, c.seed, c.step, c.name) == (variant, at, seed, 1, "blocks.w_v")
            )
            assert moved == pytest.approx(2**-8 * share, rel=1e-3)


def replay(found: Sequence[Coordinate]) -> Callable[..., tuple[list[Coordinate], Transformer[Weight]]]:
    """measure, from numbers at hand."""

    def measure(job: VariantConfig, at: int, *_: Any) -> tuple[list[Coordinate], Transformer[Weight]]:
        config = dataclasses.replace(job.config, model=dataclasses.replace(job.config.model, n_vocab=256))
        return [c for c in found if (c.variant, c.at) == (job.config.optim.rule, at)], specs(config)

    return measure


@pytest.mark.slow
def test_a_wrong_parametrization_fails(told: str, folder: Path, check, monkeypatch, capsys) -> None:
    found = read_csv(folder / "out" / coordinates.TABLE)
    monkeypatch.setattr(coordinates, "measure", replay(found))
    monkeypatch.setattr(figures, "save", lambda *_, **__: None)  # drawn above
    monkeypatch.setattr(coordinates, "_write_tensorboard", lambda *_: None)
    args = [*settings(folder, *CHECK), *OPTIONS, "--out", str(folder / "again")]
    assert check(*args) == FINISHED
    out = capsys.readouterr().out
    assert re.findall("^(?:PASS|FAIL|WARNING).*$", out, re.MULTILINE) == re.findall(
        "^(?:PASS|FAIL|WARNING).*$", told, re.MULTILINE
    )
    assert check(*args, "optim.rule=sp") == FAILED
    out = capsys.readouterr().out
    assert re.search(r"^FAIL    sp: \d+ of 94 slopes over widths 64 to 512 are not as expected", out, re.MULTILINE)
    assert "\nWARNING no control: " in out
    assert check(*args, "--max-slope", "1e-9") == FAILED and "\nPASS    the control" in capsys.readouterr().out
    assert check(*args, "--no-control") == FINISHED and "\nWARNING no control: " in capsys.readouterr().out
    flat = [dataclasses.replace(c, variant=rule) for c in found if c.variant == "mup" for rule in ("mup", "sp")]
    monkeypatch.setattr(coordinates, "measure", replay(flat))
    assert check(*args) == FAILED and "\nFAIL    the control sp does not grow" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["optim.rule=completed_p optim.batch_base=64 optim.tokens_base=640", "optim.eps_scaling=true"])
def test_the_control_drops_settings_without_use_in_sp(rule: str, folder: Path, check, monkeypatch) -> None:
    jobs: list[VariantConfig] = []
    monkeypatch.setattr(coordinates, "coordinate_check", lambda subject, control, *_: jobs.extend([*subject, *control]) or [])
    assert check(*settings(folder, *CHECK, *rule.split()), *OPTIONS) == FINISHED
    assert [job.config.optim.rule for job in jobs[2:]] == ["sp", "sp"]


def test_configs_of_a_check_over_depth(folder: Path, check, monkeypatch) -> None:
    jobs: list[list[VariantConfig]] = []
    monkeypatch.setattr(coordinates, "coordinate_check", lambda subject, control, *_: jobs.extend([subject, control]) or [])
    depth = ["--depths", "8,2", "--steps", "2"]

    def given(*args: str) -> list[list[tuple[str, int, int | None]]]:
        jobs.clear()
        assert check(*settings(folder, *CHECK), *depth, *args) == FINISHED
        return [[(job.name, job.config.model.n_layer, job.config.model.n_layer_base) for job in each] for each in jobs]

    assert given("optim.rule=completep") == [
        [("completep", 2, 2), ("completep", 8, 2)],
        [("completep without depth", 2, None), ("completep without depth", 8, None)],
    ]
    assert given("optim.rule=completep", "model.n_layer_base=4")[0] == [("completep", 2, 4), ("completep", 8, 4)]
    assert given("optim.rule=mup") == [[("mup", 2, None), ("mup", 8, None)], []]


def test_the_preset_can_be_overridden(folder: Path, check, monkeypatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(coordinates, "coordinate_check", lambda subject, *_: seen.append(subject[0].config) or [])
    assert check(str(ROOT / "configs/small.yaml"), "optim.lr=0.5", *OPTIONS) == FINISHED
    (config,) = seen
    assert (config.data.batch_size, config.data.seq_len, config.optim.schedule, config.optim.lr) == (16, 128, "constant", 0.5)
    assert (config.optim.eps, config.precision.compute, config.model.n_layer, config.name) == (1e-8, "float32", 2, "small")


MISTAKES = {
    "one width": (["--widths", "64"], "--widths 64: one width only: nothing to compare"),
    "one depth": (["--depths", "2"], "--depths 2: one depth only: nothing to compare"),
    "one step": (["--steps", "1"], "--steps 1: must be at least 2"),
    "width that heads do not divide": (["--widths", "64,100"], "model.d_model = 100: not divisible by model.d_head = 16"),
    "width twice": (["--widths", "64,64"], "--widths 64,64: a value is repeated"),
    "no width": (["--widths", "x"], "--widths x: must be integers"),
    "negative seed": (["--seeds=-1,0"], r"--seeds -1,0: must lie in 0 \.\.\. 2\^31 - 1"),
    "no slope": (["--max-slope", "nan"], "--max-slope nan: must be positive"),
    "unknown key": (["optim.rul=sp"], "optim.rul"),
    "unknown rule": (["optim.rule=spp"], "optim.rule"),
    "missing file": (["missing.yaml"], "missing.yaml: cannot read it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_reported_before_jax_starts(name: str, tmp_path: Path, check, monkeypatch, capsys) -> None:
    args, message = MISTAKES[name]
    refuse_before_jax(lambda: check("model.d_head=16", *args), message, tmp_path, monkeypatch, capsys)
    if name == "one width":  # the control: a good command does start it
        with pytest.raises(AssertionError, match="JAX was started"):
            check("model.d_head=16", "--widths", "64,128")


def test_a_folder_that_cannot_be_created_is_reported_first(folder: Path, check, monkeypatch, capsys) -> None:
    monkeypatch.setattr(coordinates, "measure", lambda *_: pytest.fail("measured"))
    assert check(*settings(folder, *CHECK), *OPTIONS, "--out", "/dev/null/out") == USAGE_ERROR
    assert capsys.readouterr().err == "error: /dev/null/out: Not a directory\n"


@pytest.mark.slow
@pytest.mark.parametrize("args", [[], ["--depths", "2,4,8,16,32", "optim.rule=completep"]])
def test_the_defaults_pass(args: list[str], tmp_path: Path) -> None:
    process = start(SCRIPT, ["configs/small.yaml", f"workdir={tmp_path}", *args], devices=3)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == FINISHED, out + err
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["PASS", "PASS", "results:"]
