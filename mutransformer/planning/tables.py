"""Tables of a plan, for a terminal of 100 columns."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mutransformer.planning.cards import Cluster
from mutransformer.planning.compiled.simulate import Overlap, Simulated, Totals
from mutransformer.planning.estimate.bounds import Estimate
from mutransformer.planning.remedies import Remedy

_MEMORY = {
    "optimizer": "optimizer state",
    "kept": "kept activations, gradients",
    "working": "working set of a layer",
    "padding": "padding of these",
    "outputs": "outputs not aliased to inputs",
    "code": "code (not in the peak)",
}
TOP = 10
PREALLOCATED = 0.75  # of a GPU's memory, by JAX's default
BOUNDS_NOTE = (
    "Lower bounds: every unit at its published peak, everything that can overlap overlapping. --compile simulates the schedule "
    "of the real compiler."
)


def estimate_tables(estimate: Estimate, by_remat: Mapping[str, Estimate], is_timed: bool) -> Group:
    """Memory, bounds, collectives and cost; by_remat: the same scenario under each remat policy. Without is_timed: no times."""
    scenario, c = estimate.scenario, estimate.scenario.config
    title = f"{c.name} on {scenario.topology}: {scenario.topology.count}, {scenario.settings}"
    rows = f"{c.data.batch_size} rows of {c.data.seq_len} tokens: {c.tokens_per_step:,} tokens per step"
    unknown = "is counted as free; give its FLOPs with --kernel-flops"
    return Group(
        Text(title, style="bold"),
        f"{estimate.parameters:,} parameters; {rows}",
        memory_table(estimate),
        _work(estimate, is_timed),
        *([_traffic(estimate, is_timed)] if estimate.traffic else []),
        _by_remat(estimate, by_remat),
        *([run_cost(estimate, estimate.seconds, _at_most(estimate)), BOUNDS_NOTE] if is_timed else []),
        *(f"warning: kernel {name} {unknown}" for name in estimate.unknown_kernels),
    )


def _at_most(estimate: Estimate) -> str:
    return f", MFU at most {estimate.mfu(estimate.seconds):.1%}"


def _work(estimate: Estimate, is_timed: bool) -> Table:
    topology = estimate.scenario.topology
    sent: dict[str, float] = {}
    for each in estimate.traffic:
        for unit, use in each.links.items():
            sent[unit] = sent.get(unit, 0.0) + use.bytes
    flops = _executed(estimate)
    what = {
        topology.compute_unit: f"{flops:.3g} FLOPs per {topology.noun}, {flops / estimate.flops['model']:.2f} x model FLOPs",
        "HBM" if topology.has_figures else "memory": f"{bytes_(estimate.hbm_bytes)} read and written per {topology.noun}",
        **{unit: f"{bytes_(size)} {topology.describe(unit)}" for unit, size in sent.items()},
    }
    if not is_timed:
        table = table_of("work of a step", "<unit", "<work")
        for unit, work in what.items():
            table.add_row(unit, work)
        return table
    bounds = table_of("lower bounds of a step", "<unit", "<work", "time", "<")
    for unit, seconds in estimate.bounds.items():
        bounds.add_row(unit, what[unit], format_seconds(seconds), "<- bounds the step" if unit == estimate.bound else "")
    return bounds


def _traffic(estimate: Estimate, is_timed: bool) -> Table:
    sent = f"sent per {estimate.scenario.topology.noun}"
    timed = ["at least"] if is_timed else []
    table = table_of("collectives per step", "<kind", "<axis", "<of", "count", "full arrays", sent, *timed)
    for t in estimate.traffic:
        sizes = (bytes_(t.bytes), bytes_(t.wire_bytes), *([format_seconds(t.seconds)] if is_timed else []))
        table.add_row(t.kind, " ".join(t.axes), t.purpose, str(t.count), *sizes)
    return table


def _by_remat(estimate: Estimate, by_remat: Mapping[str, Estimate]) -> Table:
    timed = ["step at least"] if any(other.is_timed for other in by_remat.values()) else []
    table = table_of("by model.remat", "<policy", "kept", "working set", "memory", "FLOPs", *timed, "<")
    for policy, other in by_remat.items():
        sizes = (bytes_(other.memory["kept"]), bytes_(other.memory["working"]), bytes_(other.peak_bytes))
        verdict = "" if other.fits else f"over {bytes_(estimate.scenario.topology.chip.hbm_bytes)}"
        ratio = f"{_executed(other) / other.flops['model']:.2f} x model"
        table.add_row(
            policy, *sizes, ratio, *([format_seconds(other.seconds) if other.is_timed else ""] if timed else []), verdict
        )
    return table


def untimed_note(fits: bool, estimate: Estimate, remedies: Sequence[Remedy]) -> Text:
    """Why a plan has no times: it does not fit, with the settings that would; or the devices' speed is not known."""
    topology = estimate.scenario.topology
    if fits:
        kind = topology.chip.device_kind
        return Text(f"\nNo time: the peak FLOP/s and bandwidths of {kind} are not known. To measure it: mutransformer benchmark.")
    lines = [f"  {each.settings}   ({bytes_(each.peak_bytes)} per {topology.noun})" for each in remedies]
    what = "With one of these settings it would:" if lines else "Nor would it with another model.remat, microbatches or devices."
    return Text("\n".join([f"\nIt does not fit, so there is no time to state. {what}", *lines]), style="bold")


def simulated_tables(simulated: Simulated, estimate: Estimate) -> Group:
    """Memory of the compiled step, and, if it fits, its time and its collectives."""
    title = Text(f"compiled for {simulated.scenario.topology} in {simulated.compile_seconds:.0f} s", style="bold")
    if not simulated.fits:
        return Group(title, memory_table(simulated))
    step = table_of("simulated step", "<costing", "time", "MFU", "matmul", "kernels", "other", "exposed comm.", "memory waits")
    for costing, t in simulated.totals.items():
        other = t.by_kind["other"] + t.by_kind["unestimated"]
        times = (t.by_kind["matmul"], t.by_kind["kernel"], other, t.exposed_seconds, t.by_kind["wait"])
        step.add_row(costing, format_seconds(t.seconds), f"{simulated.mfu(costing)['mfu']:.1%}", *map(format_seconds, times))
    quoted = simulated.totals[simulated.quoted]
    costliest = table_of(f"costliest operations ({simulated.quoted})", "<kind", "<op_name", "time")
    for (kind, source), seconds in list(quoted.costliest.items())[:TOP]:
        costliest.add_row(kind, "/".join(part for part in source.split("/")[-4:] if part)[-70:], format_seconds(seconds))
    return Group(
        title,
        memory_table(simulated),
        step,
        *([_collectives(quoted), _overlap(simulated.overlaps)] if quoted.collectives else []),
        costliest,
        run_cost(estimate, simulated.seconds),
        *(f"warning: {each}" for each in quoted.warnings),
        simulated.accuracy,
    )


def _collectives(quoted: Totals) -> Table:
    table = table_of("collectives per step", "<kind", "<axis", "<", "count", "full arrays", "time", "exposed", "hidden")
    for key, sums in quoted.collectives.items():
        times = (sums.seconds, sums.exposed_seconds, max(0.0, sums.seconds - sums.exposed_seconds))
        mode, axes = "async" if key.is_async else "sync", f"{' '.join(key.axes)} ({key.n})"
        table.add_row(key.kind, axes, mode, f"{sums.count:.0f}", bytes_(sums.bytes), *map(format_seconds, times))
    return table


def _overlap(overlaps: Sequence[Overlap]) -> Table:
    """Every collective of the program, once for each place where it stands, with what runs beside it."""
    at_once = sum(not each.beside for each in overlaps)
    title = f"each collective, and what is computed beside it: {at_once} of {len(overlaps)} are waited for at once"
    table = table_of(title, "<where", "<kind", "<axis", "full arrays", "time", "exposed", "<beside it")
    for each in overlaps:
        where = f"{each.where} x {each.times}" if each.times > 1 else each.where
        beside = ", ".join(f"{n} {kind}" for kind, n in each.beside.items())
        beside = f"{beside}: {format_seconds(each.beside_seconds)}" if beside else "nothing"
        c = each.collective
        times = (format_seconds(c.seconds), format_seconds(each.exposed_seconds))
        table.add_row(where, c.kind, " ".join(c.axes), bytes_(c.bytes), *times, beside)
    return table


def _executed(estimate: Estimate) -> float:
    return estimate.flops["matmul"] + estimate.flops["kernel"]


def memory_table(result: Estimate | Simulated) -> Table:
    topology = result.scenario.topology
    table, limit = table_of(f"memory per {topology.noun}", "<category", "size", "share"), topology.chip.hbm_bytes
    for name, size in result.memory.items():
        table.add_row(_MEMORY.get(name, name), bytes_(size), "" if name == "code" else f"{size / limit:.1%}")
    verdict, style = ("fits", "") if result.fits else ("DOES NOT FIT", "bold red")
    table.add_section()
    peak = result.peak_bytes
    table.add_row(f"peak, of {bytes_(limit)}: {verdict}", bytes_(peak), f"{peak / limit:.1%}", style=style)
    if isinstance(topology, Cluster) and result.fits and peak > PREALLOCATED * limit:
        table.caption = "JAX takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set"
    return table


def run_cost(estimate: Estimate, seconds: float, more: str = "") -> Text:
    run, n_steps = estimate.run(seconds), estimate.scenario.config.steps
    work = f"{n_steps:,} steps, {run['tokens']:.3g} tokens, {run['tokens_per_parameter']:.3g} per parameter"
    hours = f"{run['chip_hours']:,.1f} {estimate.scenario.topology.noun}-hours"
    cost = f"{_duration(run['days'])}, {hours} at {format_seconds(seconds)} per step{more}"
    return Text(f"\nthe run: {work}: {cost}", style="bold")


def table_of(title: str, *columns: str) -> Table:
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


def bytes_(n: float) -> str:
    return decimal(int(n), precision=2)
