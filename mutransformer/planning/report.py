"""Plans as rich tables for a terminal of 100 columns, and as plain data for --json."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mutransformer.planning.chips import HBM_EFFICIENCY
from mutransformer.planning.compiled.cost_model import LATENCY
from mutransformer.planning.compiled.replay import COMPUTE
from mutransformer.planning.compiled.simulate import ACCURACY, COSTINGS, Simulated, Totals, model_flops
from mutransformer.planning.estimate.bounds import Estimate

GUESS_NOTE = (
    "guess: lower bounds with typical losses, only for comparing settings. MFU: of the compiled step, otherwise of the guess."
)
_MEMORY = {
    "optimizer": "optimizer state",
    "kept": "kept activations, gradients",
    "working": "working set of a layer",
    "padding": "padding of these",
    "outputs": "outputs not aliased to inputs",
    "code": "code (not in the peak)",
}
TOP = 10


class _Shown:
    """str() gives the tables that a rich console shows, in 100 columns."""

    def __str__(self) -> str:
        console = Console(width=100, highlight=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass(frozen=True)
class Plan(_Shown):
    """What a step costs."""

    estimate: Estimate  # lower bounds, by arithmetic
    by_remat: dict[str, Estimate]  # the same under each value of model.remat; not for an entry of a ranking
    simulated: Simulated | None  # the simulated schedule of the TPU compiler; None if it was not compiled

    def __rich__(self) -> Group:
        shown = _estimate_tables(self.estimate, self.by_remat)
        return Group(shown, "", _simulated_tables(self.simulated, self.estimate)) if self.simulated else shown

    def as_json(self) -> dict[str, Any]:
        """Plain data: bytes, seconds and FLOPs of one chip and one step unless the key says otherwise, and the constants used."""
        scenario, chip, c = self.estimate.scenario, self.estimate.scenario.topology.chip, self.estimate.scenario.config
        memory_by_remat = {"by_remat": {policy: each.memory for policy, each in self.by_remat.items()}} if self.by_remat else {}
        return {
            "name": c.name,
            "topology": str(scenario.topology),
            "chips": scenario.topology.size,
            "mesh": scenario.mesh_sizes,
            "remat": c.model.remat,
            "grad_accumulation_steps": c.optim.grad_accumulation_steps,
            "parameters": self.estimate.parameters,
            **_pick(c, "tokens_per_step", "steps"),
            "chip": {
                **_pick(chip, "peak_flops", "clock", "hbm_bytes", "hbm_bandwidth"),
                "hbm_efficiency": HBM_EFFICIENCY,
                "ici_bandwidth_of_an_axis": chip.ici_bandwidth,
                "collective_latency": LATENCY,
            },
            "estimate": _estimate_json(self.estimate) | memory_by_remat,
            **({"compiled": _simulated_json(self.simulated, self.estimate)} if self.simulated else {}),
        }


@dataclass(frozen=True)
class Ranking(_Shown):
    """Settings that fit, fastest first."""

    plans: list[Plan]

    def __rich__(self) -> Group:
        """A table: those that were compiled first, by their simulated time."""
        columns = ("<settings", "memory", "<bound", "at least", "guess", "MFU", "compiled", "memory")
        table = _table("settings that fit, fastest first", *columns)
        for each in sorted(self.plans, key=lambda each: each.simulated.seconds if each.simulated else math.inf):
            estimate, simulated = each.estimate, each.simulated
            mfu = estimate.mfu(simulated.seconds if simulated else estimate.guess)
            compiled = (format_seconds(simulated.seconds), _bytes(simulated.peak_bytes)) if simulated else ("", "")
            settings = " ".join(setting.partition(".")[2] for setting in estimate.scenario.settings.split())
            times = (format_seconds(estimate.seconds), format_seconds(estimate.guess))
            table.add_row(settings, _bytes(estimate.peak_bytes), estimate.bound, *times, f"{mfu:.1%}", *compiled)
        return Group(table, GUESS_NOTE, *([ACCURACY] if any(each.simulated for each in self.plans) else []))

    def as_json(self) -> list[dict[str, Any]]:
        return [each.as_json() for each in self.plans]


def _estimate_tables(estimate: Estimate, by_remat: Mapping[str, Estimate]) -> Group:
    """Memory, bounds, collectives and cost; by_remat: the same scenario under each remat policy."""
    scenario, c = estimate.scenario, estimate.scenario.config
    title = f"{c.name} on {scenario.topology}: {scenario.topology.size} chips, {scenario.settings}"
    rows = f"{c.data.batch_size} rows of {c.data.seq_len} tokens: {c.tokens_per_step:,} tokens per step"
    what = {
        "MXU": f"{_executed(estimate):.3g} FLOPs per chip, {_executed(estimate) / estimate.flops['model']:.2f} x model FLOPs",
        "HBM": f"{_bytes(estimate.hbm_bytes)} read and written per chip",
    }
    for axis in scenario.mesh_sizes:
        sent = float(sum(each.wire_bytes for each in estimate.traffic if axis in each.axes))
        what[f"ICI {axis}"] = f"{_bytes(sent)} sent per chip along {axis}"
    bounds = _table("lower bounds of a step", "<unit", "<work", "time", "<")
    for unit, seconds in estimate.bounds.items():
        bounds.add_row(unit, what[unit], format_seconds(seconds), "<- bounds the step" if unit == estimate.bound else "")
    traffic = _table("collectives per step", "<kind", "<axis", "<of", "count", "full arrays", "sent per chip", "at least")
    for t in estimate.traffic:
        sizes = (_bytes(t.bytes), _bytes(t.wire_bytes), format_seconds(t.seconds))
        traffic.add_row(t.kind, " ".join(t.axes), t.purpose, str(t.count), *sizes)
    remat = _table("by model.remat", "<policy", "kept", "working set", "memory", "FLOPs", "step at least", "<")
    for policy, other in by_remat.items():
        sizes = (_bytes(other.memory["kept"]), _bytes(other.memory["working"]), _bytes(other.peak_bytes))
        verdict = "" if other.fits else f"over {_bytes(scenario.topology.chip.hbm_bytes)}"
        ratio = f"{_executed(other) / other.flops['model']:.2f} x model"
        remat.add_row(policy, *sizes, ratio, format_seconds(other.seconds), verdict)
    return Group(
        Text(title, style="bold"),
        f"{estimate.parameters:,} parameters; {rows}",
        _memory(estimate),
        bounds,
        *([traffic] if estimate.traffic else []),
        remat,
        _run_cost(estimate, estimate.seconds, f", MFU {estimate.mfu(estimate.seconds):.1%}"),
        "Lower bounds: every unit at its published peak, everything that can overlap overlapping. --compile simulates the "
        "schedule of the TPU compiler.",
        *(f"warning: kernel {name} is counted as free; give its FLOPs with --kernel-flops" for name in estimate.unknown_kernels),
    )


def _simulated_tables(simulated: Simulated, estimate: Estimate) -> Group:
    """Memory, time and collectives of the compiled step."""
    step = _table("simulated step", "<costing", "time", "MFU", "matmul", "kernels", "other", "exposed comm.", "memory waits")
    for costing in COSTINGS:
        t = simulated.totals[costing]
        other = t.by_kind["other"] + t.by_kind["unestimated"]
        times = (t.by_kind["matmul"], t.by_kind["kernel"], other, t.exposed_seconds, t.by_kind["wait"])
        step.add_row(costing, format_seconds(t.seconds), f"{simulated.mfu(costing)['mfu']:.1%}", *map(format_seconds, times))
    quoted = simulated.totals[COSTINGS[0]]
    moves = _table("collectives per step", "<kind", "<axis", "<", "count", "full arrays", "time", "exposed", "hidden")
    for key, sums in quoted.collectives.items():
        times = (sums.seconds, sums.exposed_seconds, max(0.0, sums.seconds - sums.exposed_seconds))
        mode, axes = "async" if key.is_async else "sync", f"{' '.join(key.axes)} ({key.n})"
        moves.add_row(key.kind, axes, mode, f"{sums.count:.0f}", _bytes(sums.bytes), *map(format_seconds, times))
    costliest = _table(f"costliest operations ({COSTINGS[0]})", "<kind", "<op_name", "time")
    for (kind, source), seconds in list(quoted.costliest.items())[:TOP]:
        costliest.add_row(kind, "/".join(part for part in source.split("/")[-4:] if part)[-70:], format_seconds(seconds))
    return Group(
        Text(f"compiled for {simulated.scenario.topology} in {simulated.compile_seconds:.0f} s", style="bold"),
        _memory(simulated),
        step,
        *([moves] if quoted.collectives else []),
        costliest,
        _run_cost(estimate, simulated.seconds),
        *(f"warning: {each}" for each in quoted.warnings),
        ACCURACY,
    )


def _executed(estimate: Estimate) -> float:
    return estimate.flops["matmul"] + estimate.flops["kernel"]


def _memory(result: Estimate | Simulated) -> Table:
    table, limit = _table("memory per chip", "<category", "size", "share"), result.scenario.topology.chip.hbm_bytes
    for name, size in result.memory.items():
        table.add_row(_MEMORY.get(name, name), _bytes(size), "" if name == "code" else f"{size / limit:.1%}")
    verdict, style = ("fits", "") if result.fits else ("DOES NOT FIT", "bold red")
    table.add_section()
    peak = result.peak_bytes
    table.add_row(f"peak, of {_bytes(limit)}: {verdict}", _bytes(peak), f"{peak / limit:.1%}", style=style)
    return table


def _run_cost(estimate: Estimate, seconds: float, more: str = "") -> Text:
    run, n_steps = estimate.run(seconds), estimate.scenario.config.steps
    work = f"{n_steps:,} steps, {run['tokens']:.3g} tokens, {run['tokens_per_parameter']:.3g} per parameter"
    cost = f"{_duration(run['days'])}, {run['chip_hours']:,.1f} chip-hours at {format_seconds(seconds)} per step{more}"
    return Text(f"\nthe run: {work}: {cost}", style="bold")


def _table(title: str, *columns: str) -> Table:
    """A table; columns that begin with "<" are left-aligned."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = False
    for column in columns:
        table.add_column(column.removeprefix("<"), justify="left" if column.startswith("<") else "right", overflow="fold")
    return table


def format_seconds(s: float) -> str:
    """A duration up to some minutes, as in 0.279 s, 14.2 ms, 3.1 us."""
    if s < 1e-6:
        return "< 1 us" if s else "0"
    return f"{s:.3f} s" if s >= 0.1 else f"{s * 1e3:.3g} ms" if s >= 1e-3 else f"{s * 1e6:.3g} us"


def _duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else f"{days * 24:.1f} hours" if days * 24 >= 2 else f"{days * 1440:.1f} minutes"


def _bytes(n: float) -> str:
    return decimal(int(n), precision=2)


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    keys = ("kind", "axes", "count", "bytes", "wire_bytes", "seconds")
    return {
        **_pick(estimate, "memory", "peak_bytes", "fits", "flops", "hbm_bytes", "bounds", "bound", "unknown_kernels"),
        "collectives": [{"of": each.purpose, **_pick(each, *keys)} for each in estimate.traffic],
        "step_seconds_at_least": estimate.seconds,
        "step_seconds_guess": estimate.guess,
        "mfu_at_most": estimate.mfu(estimate.seconds),
        "run_at_least": estimate.run(estimate.seconds),
    }


def _simulated_json(simulated: Simulated, estimate: Estimate) -> dict[str, Any]:
    n_chips = simulated.scenario.topology.size
    return {
        "compile_seconds": simulated.compile_seconds,
        **_pick(simulated, "memory", "peak_bytes", "fits"),
        "step_seconds": simulated.seconds,
        "model_flops": {name: each * n_chips for name, each in model_flops(simulated.scenario).items()},
        "costings": {each: simulated.mfu(each) | _totals_json(simulated.totals[each]) for each in COSTINGS},
        "run": estimate.run(simulated.seconds),
        "warnings": simulated.totals[COSTINGS[0]].warnings,
        "trust": ACCURACY,
    }


def _totals_json(t: Totals) -> dict[str, Any]:
    return {
        "step_seconds": t.seconds,
        **_pick(t, "compute_seconds", "communication_seconds", "exposed_seconds"),
        **{f"{kind}_seconds": t.by_kind[kind] for kind in COMPUTE},
        "memory_wait_seconds": t.by_kind["wait"],
        "collectives": [
            {"kind": key.kind, "axes": key.axes, "group": key.n, "async": key.is_async, **dataclasses.asdict(sums)}
            for key, sums in t.collectives.items()
        ],
        "top": [{"kind": kind, "source": source, "seconds": s} for (kind, source), s in list(t.costliest.items())[:20]],
    }


def _pick(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
