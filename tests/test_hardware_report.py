"""The hardware report: each section's numbers against something independent, and what a failure leaves of the others."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import light_sections
import numpy as np
import pytest
from short_runs import ROOT, refuse_before_jax, settings

from mutransformer import cli
from mutransformer.config.load import load
from mutransformer.errors import FAILED, FINISHED, USAGE_ERROR, ConfigError
from mutransformer.model import attention as attention_module
from mutransformer.planning.machines import parse_topology
from mutransformer.planning.plan import plan
from mutransformer.study.hardware import device, kernels, report, throughput
from mutransformer.study.hardware.page import page
from mutransformer.study.hardware.report import Section, write
from mutransformer.study.hardware.section import Result, SectionFailed, Task, without_folders
from mutransformer.study.hardware.sizes import (
    ACCELERATOR,
    CPU,
    AttentionSize,
    Sizes,
    StepSize,
    SweepSize,
    TransferSize,
    sizes_for,
)
from mutransformer.study.hardware.step_time import StepTimer, build_alone

ATTENTION = AttentionSize(rows=2, positions=64, heads=2, kv_heads=(1,), d_head=16)
SMALL = ("model.d_head=16", "model.n_layer=2", "model.n_vocab=384", "data.tokenizer=bytes", "data.seq_len=32")
NARROW = StepSize("narrow", (*SMALL, "model.d_model=32"), 1)
HUGE = StepSize("huge", (*SMALL, "model.d_model=4096"), 1)
PEAK = 1e12


def last(results: Iterator[Result]) -> Result:
    return list(results)[-1]


# Sections


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    found = settings(tmp_path_factory.mktemp("text"), "log.tensorboard=false", "steps=8", "data.batch_size=2", "model.d_base=32")
    varied = ("data.batch_size=8", "workdir", "model.d_model", "log.every")
    of_transfer = tuple(each for each in found if not each.startswith(varied))
    return Sizes(
        attention=ATTENTION,
        steps=(NARROW,),
        seconds=0.01,
        repeats=3,
        traced=NARROW,
        traced_steps=2,
        sweep=(SweepSize("width 32", (*SMALL, "data.batch_size=2", "model.d_model=32")),),
        n_rates=3,
        transfer=TransferSize(of_transfer, (32, 64), (-9.0, -7.0, -5.0), ("mup", "sp")),
        limits={"device": 120.0} | {section.name: 120.0 for section in report.SECTIONS},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sections")


class Results(dict[str, Result]):
    """The results of sections, each run once, when it is first asked for; in this process, with a known peak.

    A step runs on eight devices, a sweep on one, to compile less. The transfer has time for one rule.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._sizes, self._sections = folder, sizes, {section.name: section for section in report.SECTIONS}

    def __missing__(self, name: str) -> Result:
        section, one = self._sections[name], jax.devices()[:1]
        run = getattr(importlib.import_module(section.module), section.function)
        deadline = time.monotonic() + 1 if name == "transfer" else math.inf
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mutransformer.study.hardware.step_time.peak_flops", lambda kind: PEAK)
            if name in ("sweep", "transfer"):
                for function in ("devices", "local_devices"):
                    patch.setattr(jax, function, lambda: one)
                for function in ("device_count", "local_device_count"):
                    patch.setattr(jax, function, lambda: 1)
            self[name] = last(run(Task(self._folder, deadline=deadline), *section.arguments(self._sizes)))
        return self[name]


@pytest.fixture(scope="module")
def results(folder: Path, sizes: Sizes) -> Results:
    return Results(folder, sizes)


def test_kernels_agree_with_the_plain_formula(results: dict[str, Result]) -> None:
    compared = results["kernels"]
    assert {each["kernel"] for each in compared["cases"]} == {"blockwise", "dense"}
    assert compared["left_out"] == ["splash_interpreted: needs a multiple of 128 positions, not data.seq_len = 64"]
    assert len(compared["cases"]) == 4 and {each["documents"] for each in compared["cases"]} == {True, False}
    tolerance = kernels.TOLERANCE[compared["dtype"]]
    assert all(0 < each["distance"] <= tolerance < 0.1 < each["control"] for each in compared["cases"])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda q, k, v, scale, segments: (q, k, v, 1.02 * scale, segments), r"dense, 2 heads for 1.*: the .* is off by"),
        (lambda q, k, v, scale, segments: (q, k, v, scale, None), "documents apart: the .* is off by"),
        (lambda q, k, v, scale, segments: (q, k, v * np.nan, scale, segments), "the output is off by nan"),
    ],
    ids=["scale", "mask", "NaN"],
)
def test_a_broken_kernel_fails(broken: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_module.softmax_attention
    given: list[Result] = []

    def wrong(q: Any, k: Any, v: Any, segments: Any, scale: float, layout: Any) -> Any:
        q, k, v, scale, segments = broken(q, k, v, scale, segments)
        return right(q, k, v, segments, scale, layout)

    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "softmax_attention", wrong)
        patch.setattr(kernels, "kernels_of", lambda device: ["dense"])
        with pytest.raises(SectionFailed, match=message):
            given.extend(kernels.kernels(Task(tmp_path), ATTENTION))
    assert len(given) == 2, "what was compared is kept"


def test_a_control_that_shows_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_of", lambda device: ["blockwise"])
    monkeypatch.setattr(kernels, "APART", 1e9)
    with pytest.raises(SectionFailed, match="a wrong mask is off by only"):
        list(kernels.kernels(Task(tmp_path), ATTENTION))


def test_kernels_that_would_not_end_in_time_are_left_out(tmp_path: Path) -> None:
    found: list[Result] = []
    with pytest.raises(SectionFailed, match="no kernel was compared"):
        found.extend(kernels.kernels(Task(tmp_path, deadline=time.monotonic()), ATTENTION))
    assert re.match(r"blockwise, 2 heads for 1: -\d+ s are left", found[-1]["left_out"][0])


def test_mfu_is_flops_over_time_and_peak(results: dict[str, Result]) -> None:
    (each,) = results["throughput"]["sizes"]
    median = sorted(each["seconds_per_step"])[1]
    assert each["rows"] == 8 and each["positions"] == 32 and len(each["seconds_per_step"]) == 3
    assert each["tokens_per_second"] == pytest.approx(8 * 32 / median, rel=1e-2)
    d, layers, vocabulary = 32, 2, 384
    weights = layers * (4 * d * d + 8 * d * d) + vocabulary * d
    flops = 8 * 32 * (6 * weights + 12 * layers * d * 32)
    assert each["mfu"] == pytest.approx(flops / (median * 8 * PEAK), rel=1e-2, abs=6e-5)
    assert each["model_flops_per_second"] == pytest.approx(flops / median, rel=1e-2)
    assert each["parameters"] == weights + vocabulary * d
    p = each["predicted"]
    assert 0.5 < p["peak_bytes_compiled"] / p["peak_bytes_estimated"] < 2 and "bound" not in p, "a CPU has no figures"


def test_a_step_on_a_known_card_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate that stands beside the measured time is the planner's, and the program is replayed by the card's costs."""
    machine = parse_topology("h100:8")
    monkeypatch.setattr(throughput, "this_machine", lambda: machine)
    config, found = throughput.fitting_rows(Task(tmp_path), NARROW)
    timer = StepTimer(build_alone(config))
    p = throughput.predicted(found, timer, 1.0)
    want = plan(config, "h100:8").estimate
    assert (p["seconds_at_least"], p["bound"], p["seconds_guess"]) == (want.seconds, want.bound, want.guess)
    assert p["seconds_simulated"] > p["seconds_at_least"]
    assert p["measured_over_simulated"] == pytest.approx(1 / p["seconds_simulated"], rel=1e-3)


def test_a_size_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows are tried first, and the other sizes are timed."""
    task = Task(tmp_path)
    one, two = (throughput.fitting_rows(task, NARROW._replace(rows=rows))[1].peak_bytes for rows in (1, 2))
    limit = throughput.ESTIMATE_ERROR * (one + two) / 2
    monkeypatch.setattr("mutransformer.planning.machines.memory_limit", lambda device, n: limit)
    monkeypatch.setattr(throughput, "timed", lambda config, *_: {"rows": config.data.batch_size, "tokens_per_second": 1})
    found = last(throughput.throughput(task, (HUGE, NARROW._replace(rows=2)), 0.01, 1))
    assert [each["rows"] for each in found["sizes"]] == [8] and len(found["left_out"]) == 1
    assert re.match(r"huge: needs up to \d+\.\d GB with one row on a device, which has 0\.0 GB", found["left_out"][0])
    with pytest.raises(SectionFailed, match="no size was timed: huge"):
        list(throughput.throughput(task, (HUGE,), 0.01, 1))


def test_a_size_that_would_not_end_in_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any) -> Result:
        time.sleep(0.6)
        return {"tokens_per_second": 1}

    monkeypatch.setattr(throughput, "timed", timed)
    late = Task(tmp_path, deadline=time.monotonic() + 1.0)
    found = last(throughput.throughput(late, (NARROW, NARROW._replace(name="wide")), 0.01, 1))
    assert [each["name"] for each in found["sizes"]] == ["narrow"]
    assert re.fullmatch(r"wide: -?\d+ s are left, and the size before it took \d+ s", found["left_out"][0])


def test_too_little_memory_leaves_a_size_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(config: Any, *_: Any) -> Result:
        if config.data.batch_size > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.\nat ...")
        return {"tokens_per_second": 1}

    monkeypatch.setattr(throughput, "timed", timed)
    found = last(throughput.throughput(Task(tmp_path), (NARROW, NARROW._replace(name="wide", rows=2)), 0.01, 1))
    assert [each["name"] for each in found["sizes"]] == ["narrow"]
    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."
    assert found["left_out"] == [f"wide: out of memory: {message}"]


def test_the_trace_of_a_step(results: dict[str, Result], folder: Path) -> None:
    found = results["trace"]
    shares = found["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[kind] for kind in ("matrix products", "attention", "other", "collectives")) > 0
    assert found["step_seconds"] > 0 and found["longest"] and found["gaps"]["words"]
    assert (folder / "trace/.gitignore").read_text() == "*\n" and list((folder / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_the_sweep_factor(results: dict[str, Result]) -> None:
    (each,) = results["sweep"]["sizes"]
    assert each["factor"] == pytest.approx(3 * each["alone_seconds"] / each["together_seconds"])
    assert each["alone_seconds"] == np.median(each["alone_repeats"]) > 0
    assert each["together_seconds"] == np.median(each["together_repeats"]) > 0


@pytest.mark.slow
def test_the_short_transfer(results: dict[str, Result], sizes: Sizes, folder: Path) -> None:
    found, rates = results["transfer"], sizes.transfer.rates
    assert [each["rule"] for each in found["rules"]] == ["mup"] and found["steps"] == 8
    assert re.fullmatch(r"sp: -\d+ s are left, and mup took \d+ s", found["left_out"][0])
    runs = [json.loads(line) for line in (folder / "transfer/runs.jsonl").read_text().splitlines()]
    assert len(runs) == 6
    narrow, wide = found["rules"][0]["sizes"]
    for each in (narrow, wide):
        trained = {run["lr"]: run["validation_loss"] for run in runs if run["width"] == each["width"]}
        losses = [trained[2.0**rate] for rate in rates]
        assert each["losses"] == losses and each["best_loss"] == min(losses)
        assert each["best_rate"] == rates[losses.index(min(losses))]
        assert each["penalty"] == losses[rates.index(narrow["best_rate"])] - min(losses)


# The environment


def test_no_path_and_no_secret_is_in_it() -> None:
    given = {"XLA_FLAGS": "--xla_dump_to=/home/me/dump --xla_x=1", "JAX_COORDINATOR_ADDRESS": "host:1", "HOME": "/home/me"}
    given |= {"JAX_COMPILATION_CACHE_DIR": "/tmp/x", "NCCL_ALGO": "Ring", "HOSTNAME": "host"}
    assert device.environment(given) == {"XLA_FLAGS": "--xla_dump_to=dump --xla_x=1", "NCCL_ALGO": "Ring"}
    assert without_folders("OSError: ~/a/b.txt and /x/y/z: no") == "OSError: b.txt and z: no"
    assert without_folders("jit(f)/while/body, 2 / 3, a/b/c") == "jit(f)/while/body, 2 / 3, a/b/c"


@pytest.mark.parametrize(
    ("platform", "kind", "count", "name"),
    [
        ("cpu", "cpu", 1, "cpu-2-core-avx2-jax-0.10.2"),
        ("gpu", "NVIDIA H100 80GB HBM3", 1, "nvidia-h100-80gb-hbm3-jax-0.10.2"),
        ("tpu", "TPU v5 lite", 8, "8x-tpu-v5-lite-jax-0.10.2"),
    ],
)
def test_the_folder_has_the_name_of_the_device(platform: str, kind: str, count: int, name: str) -> None:
    assert device.name_of(platform, kind, count, 2, "avx2", "0.10.2") == name


def test_the_limits_add_up_to_what_is_promised() -> None:
    assert sum(sizes_for("gpu").limits.values()) <= 8 * 60 and sum(sizes_for("cpu").limits.values()) <= 10 * 60
    for sizes in (ACCELERATOR, CPU):
        assert sizes.limits.keys() == {"device", *(section.name for section in report.SECTIONS)}
        for of_config in (*sizes.steps, sizes.traced, *sizes.sweep, sizes.transfer):
            load(of_config.settings)


# Sections in processes of their own


def run_light(out: Path, *names: str, given: Sequence[str] = (), limit: float = 60.0) -> tuple[int, Any]:
    small = replace(CPU, limits={"slow": 2.0} | dict.fromkeys(("good", "failing", "killed"), limit))
    code, _ = write(out, given, sizes=lambda platform: small, sections=[light_sections.SECTIONS[name] for name in names])
    return code, json.loads((out / "report.json").read_text())["sections"]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DEVICE", light_sections.DEVICE)


@pytest.mark.usefixtures("light")
def test_a_failed_section_does_not_take_the_others_along(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    code, found = run_light(out, "failing", "killed", "slow", "good")
    status = {name: each["status"] for name, each in found.items()}
    assert code == FAILED and status == {"failing": "failed", "killed": "failed", "slow": "failed", "good": "finished"}
    assert {each["result"]["value"] for each in found.values()} == {7}, "what a section gave is kept"
    assert found["failing"]["error"] == "OSError: no such file: light_sections.py"
    assert found["killed"]["error"] == "its process was ended by SIGKILL"
    assert found["slow"]["error"] == "not finished within its limit of 2 s"
    shown = capfd.readouterr().err
    assert "[4/4] good: a test; at most 60 s" in shown and "      working" in shown
    text = (out / "report.md").read_text()
    assert "**Failed**: OSError: no such file: light_sections.py" in text
    assert str(ROOT) not in text and str(tmp_path) not in text
    assert "**The machine was not idle" in text


def test_what_runs_the_sections_starts_no_jax() -> None:
    """It would hold the memory of a GPU, and a TPU, that the sections need."""
    code = "import sys, mutransformer.study.hardware.report; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.usefixtures("light")
def test_a_report_is_continued_and_nothing_else_is_overwritten(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    assert run_light(out, "failing", "good")[0] == FAILED
    (out / "by_good.txt").unlink()
    code, found = run_light(out, "failing", "good")
    assert code == FAILED and found["good"]["status"] == "finished"
    assert not (out / "by_good.txt").exists() and "good: a test: done before" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="holds a report with other settings; choose another folder"):
        run_light(out, "good", given=["xla_tuned=false"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    for folder, why in ((other, "holds something other than a report"), (other / "notes.txt", "is a file")):
        with pytest.raises(ConfigError, match=why):
            write(folder)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x"], "--out: is the folder of a report: needs --report"),
        (["--report", "small"], "small: --report chooses its own configs"),
        (["--report", "model.d_model=256"], "model.d_model=256: --report chooses its own configs"),
        (["--report", "precision.compute=float8"], "precision.compute=float8: must be"),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refuse_before_jax(lambda: cli.main(["benchmark", *args]), re.escape(message), tmp_path, monkeypatch, capsys)
    assert USAGE_ERROR == 2


# The command


def test_benchmark_alone_prints_json(capsys: Any) -> None:
    """Without --report: the step of one config, with what log.layers costs."""
    args = [*SMALL, "model.d_model=32", "data.batch_size=8", "log.layers=2", "compile_cache=null"]
    assert cli.main(["benchmark", *args, "--seconds", "0.01", "--repeats", "3"]) == FINISHED
    found = json.loads(capsys.readouterr().out)
    assert found["step_seconds"] == pytest.approx(8 * 32 / found["tokens_per_second"], rel=0.01)
    low, high = found["range"]
    assert low <= found["tokens_per_second"] <= high and found["repeats"] == 3 and found["mfu"] is None
    assert found["layers_every"] == 2 and found["steps_per_repeat"] % 2 == 0
    assert found["layers_overhead_range"][0] <= found["layers_overhead"] <= found["layers_overhead_range"][1]
    assert found["mesh"] == {"x": 8, "y": 1} and found["compute"] in ("float32", "bfloat16")


# All of it


@pytest.mark.slow
def test_the_whole_report(results: dict[str, Result], sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `benchmark --report` writes, of sections that ran in this process."""

    def run(section: Section, *_: Any, **__: Any) -> Result:
        found = results[section.name] if section in report.SECTIONS else last(device.describe(Task(tmp_path)))
        return {"status": "finished", "error": None, "seconds": 1.0, "limit": 2.0, "result": json.loads(json.dumps(found))}

    monkeypatch.setattr(report, "_run", run)
    code, out = write(None, ["xla_tuned=true"], workdir=tmp_path, sizes=lambda platform: sizes)
    assert code == FINISHED and out.parent == tmp_path / "hardware" and re.fullmatch(r"cpu-\d+-core-.*jax-[\d.]+", out.name)
    stored = json.loads((out / "report.json").read_text())
    assert list(stored["sections"]) == [section.name for section in report.SECTIONS]
    text = (out / "report.md").read_text()
    assert text == page(stored) and "–" in text
    for number in (
        f"{results['throughput']['sizes'][0]['tokens_per_second']:,}",
        f"**{results['sweep']['sizes'][0]['factor']:.2f}**",
        f"| idle | {results['trace']['shares']['idle']:.1%} |",
        f"**{results['transfer']['rules'][0]['sizes'][0]['best_loss']:.3f}**",
        f"{results['kernels']['cases'][0]['distance']:.1e}",
        "`mutransformer benchmark --report xla_tuned=true`",
    ):
        assert number in text
    columns: dict[str, set[int]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns[block] = {line.count("|") for line in block.splitlines()}
    assert len(columns) >= 7 and all(len(counts) == 1 for counts in columns.values()), "a row has the columns of its head"
    assert str(tmp_path) not in text + json.dumps(stored)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Every section in its process, as on any machine, on a CPU: within its time."""
    began = time.monotonic()
    out = tmp_path / "report"
    assert cli.main(["benchmark", "--report", "--out", str(out)]) == FINISHED
    assert time.monotonic() - began < 660
    stored = json.loads((out / "report.json").read_text())
    assert all(each["status"] == "finished" for each in stored["sections"].values())


# The committed examples


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "results/hardware").glob("*")))
def test_a_committed_report_is_complete_and_says_nothing_of_the_host(folder: str) -> None:
    path = ROOT / "results/hardware" / folder
    assert {each.name for each in path.iterdir()} - {"trace"} == {"report.md", "report.json"}
    stored = json.loads((path / "report.json").read_text(encoding="utf-8"))
    assert stored["device"]["name"] == folder and list(stored["sections"]) == [section.name for section in report.SECTIONS]
    assert all(each["status"] == "finished" for each in stored["sections"].values())
    text = (path / "report.md").read_text(encoding="utf-8")
    assert text == page(stored)
    assert not re.search(r"(?<![\w)>~.\]/])~?/(home|root|work|tmp|usr|opt|mnt|data)\b", text + json.dumps(stored))
    assert os.uname().nodename not in text + json.dumps(stored) or os.uname().nodename in ("localhost", "cpu")
