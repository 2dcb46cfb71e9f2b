"""A plan in words: tables for a terminal of 100 columns."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mutransformer.planning.estimate import Estimate
from mutransformer.planning.search import describe
from mutransformer.planning.simulate import COSTINGS, Simulated, flops_by_convention

BOUND_NOTE = (
    "Lower bounds: every unit at its published peak, and all that can overlap overlapping. --compile asks the TPU compiler."
)
TRUST = (
    "Simulated from the schedule of the real TPU compiler, not timed on hardware. Expect +-15 % where compute bounds the step "
    "and +-30 % or worse where communication is exposed; differences under 5 % mean nothing. Pallas kernels are costed at an "
    "assumed share of peak."
)
_MEMORY = {
    "optimizer": "optimizer state",
    "kept": "kept for the backward pass, gradients",
    "working": "a layer in work",
    "padding": "padding of these",
    "outputs": "outputs not written over inputs",
}
TOP = 10


def estimated(found: Estimate, policies: dict[str, Estimate]) -> Group:
    """The instant answer.

    Args:
        found: of the case.
        policies: the same under each remat policy.
    """
    topology, chip, c = found.case.topology, found.case.topology.chip, found.case.config
    run = found.run(found.seconds)
    head = Text(f"{c.name} on {topology}: {topology.size} chips, {describe(found.case)}", style="bold")
    rows = f"{c.data.batch_size} rows of {c.data.seq_len} tokens: {c.tokens_per_step:,} tokens a step"
    facts = Text(f"{_count(found.parameters)} parameters; {rows}")
    bounds = _table("a step at least", "unit", "what", "seconds", "")
    share = found.flops["matmul"] + found.flops["kernel"]
    what = {
        "MXU": f"{share:.3g} FLOPs a chip, {share / found.flops['model']:.2f} x model FLOPs",
        "HBM": f"{_bytes(found.hbm_bytes)} read and written a chip",
    }
    for axis in found.case.sizes:
        wire = _bytes(float(sum(each.wire for each in found.traffic if axis in each.axes)))
        what[f"ICI {axis}"] = f"{wire} sent a chip along {axis}"
    for name, seconds in found.bounds.items():
        bounds.add_row(name, what[name], _seconds(seconds), "<- bounds the step" if name == found.bound else "")
    traffic = _table("collectives of a step", "kind", "axis", "of", "count", "whole arrays", "sent a chip", "at least")
    for each in found.traffic:
        traffic.add_row(
            *(each.kind, " ".join(each.axes), each.purpose, str(each.count)),
            *(_bytes(each.bytes), _bytes(each.wire), _seconds(each.seconds)),
        )
    remat = _table("by model.remat", "policy", "kept", "in work", "memory", "FLOPs", "step at least", "")
    for policy, other in policies.items():
        executed = (other.flops["matmul"] + other.flops["kernel"]) / other.flops["model"]
        remat.add_row(
            *(policy, _bytes(other.memory["kept"]), _bytes(other.memory["working"]), _bytes(other.peak)),
            *(f"{executed:.2f} x model", _seconds(other.seconds), "" if other.fits else f"over {_bytes(chip.hbm_bytes)}"),
        )
    parts: list[Any] = [head, facts, _memory(found.memory, found.peak, chip.hbm_bytes, found.fits), bounds]
    parts += [traffic] if found.traffic else []
    parts += [remat, _whole_run(found, run, f"at {_seconds(found.seconds)} a step, MFU {found.mfu:.1%}"), Text(BOUND_NOTE)]
    parts += [Text(f"warning: kernel {name} counts for nothing; tell its FLOPs with --kernel-flops") for name in found.unknown]
    return Group(*parts)


def simulated(found: Simulated, estimate: Estimate) -> Group:
    """The compiled answer."""
    chip, flops = found.case.topology.chip, flops_by_convention(estimate)["mfu"]
    head = Text(f"compiled for {found.case.topology} in {found.compiled.seconds:.0f} s", style="bold")
    step = _table("a step, simulated", "costing", "seconds", "MFU", "matmul", "kernels", "other", "waits for links", "for memory")
    for costing in COSTINGS:
        t = found.totals[costing]
        other = t.by_kind["other"] + t.by_kind["unestimated"]
        times = (t.by_kind["matmul"], t.by_kind["kernel"], other, t.exposed, t.by_kind["wait"])
        step.add_row(costing, _seconds(t.seconds), f"{found.mfu(costing, flops):.1%}", *map(_seconds, times))
    first = found.totals[COSTINGS[0]]
    moves = _table("collectives of a step", "kind", "axis", "", "count", "whole arrays", "seconds", "exposed", "hidden")
    for key, (count, whole, _, seconds, exposed) in sorted(first.collectives.items(), key=lambda item: -item[1][3]):
        hidden = _seconds(max(0.0, seconds - exposed))
        mode = "async" if key.is_async else "sync"
        cells = (f"{count:.0f}", _bytes(whole), _seconds(seconds), _seconds(exposed), hidden)
        moves.add_row(key.kind, f"{' '.join(key.axes)} ({key.n})", mode, *cells)
    costly = _table(f"where time goes ({COSTINGS[0]})", "kind", "in the program", "seconds")
    for kind, source, seconds in first.costly(TOP):
        costly.add_row(kind, _short(source), _seconds(seconds))
    run = estimate.run(found.seconds)
    parts: list[Any] = [head, _memory(found.memory, found.peak, chip.hbm_bytes, found.fits, apart="code"), step]
    parts += [moves] if first.collectives else []
    parts += [costly, _whole_run(estimate, run, f"at {_seconds(found.seconds)} a step")]
    parts += [Text(f"warning: {each}") for each in first.warnings] + [Text(TRUST)]
    return Group(*parts)


def ranking(found: list[Estimate], compiled: dict[int, Simulated], top: int) -> Group:
    """What a search found; compiled: by its place there."""
    table = _table("what fits, fastest first", "settings", "memory", "bound", "at least", "guess", "MFU", "compiled", "memory ")
    order = sorted(range(min(top, len(found))), key=lambda i: (i not in compiled, compiled[i].seconds if i in compiled else i))
    for i in order:
        each, real = found[i], compiled.get(i)
        seconds = real.seconds if real else each.guess
        mfu = each.flops["model"] / (seconds * each.case.topology.chip.peak_flops)
        told = (_seconds(real.seconds), _bytes(real.peak)) if real else ("", "")
        settings = describe(each.case).replace("mesh.", "").replace("model.", "").replace("optim.", "")
        table.add_row(settings, _bytes(each.peak), each.bound, _seconds(each.seconds), _seconds(each.guess), f"{mfu:.1%}", *told)
    note = "guess: the bounds with usual losses, to compare settings; MFU at the compiled step, or at the guess."
    return Group(table, Text(note), *([Text(TRUST)] if compiled else []))


def _memory(items: dict[str, float], total: float, limit: float, fits: bool, apart: str = "") -> Table:
    """Args: items: bytes by what holds them; apart: the one that the total leaves out."""
    table = _table("memory of a chip", "what", "size", "share")
    for name, size in items.items():
        label = _MEMORY.get(name, name) + (" (not in the sum)" if name == apart else "")
        table.add_row(label, _bytes(size), "" if name == apart else f"{size / limit:.1%}")
    verdict, style = ("fits", "") if fits else ("DOES NOT FIT", "bold red")
    table.add_section()
    table.add_row(f"at most, of {_bytes(limit)}: {verdict}", _bytes(total), f"{total / limit:.1%}", style=style)
    return table


def _whole_run(found: Estimate, run: dict[str, float], pace: str) -> Text:
    steps = f"{found.case.config.steps:,} steps, {run['tokens']:.3g} tokens, {run['tokens_per_parameter']:.3g} a parameter"
    return Text(f"\nthe run: {steps}: {_duration(run['days'])}, {run['chip_hours']:,.1f} chip-hours {pace}", style="bold")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    words = {"what", "unit", "kind", "axis", "of", "policy", "costing", "settings", "bound", "in the program", ""}
    for column in columns:
        table.add_column(column.strip(), justify="left" if column in words else "right", overflow="fold")
    return table


def _short(source: str) -> str:
    return "/".join(part for part in source.split("/")[-4:] if part)[-70:]


def _bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1e3:.1f} kB" if n >= 1e3 else f"{n:.0f} B"


def _seconds(s: float) -> str:
    if s < 1e-6:
        return "< 1 us" if s else "0"
    return f"{s:.3f} s" if s >= 0.1 else f"{s * 1e3:.3g} ms" if s >= 1e-3 else f"{s * 1e6:.3g} us"


def _duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else f"{days * 24:.1f} hours" if days * 24 >= 2 else f"{days * 1440:.1f} minutes"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million"
