"""One step as a picture: what the core, the links of each axis and the memory do, from the first operation to the last."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mutransformer.errors import check
from mutransformer.planning.simulate import COSTINGS, Simulated
from mutransformer.planning.walk import Rounds, Schedule

COLOURS = {
    "matmul": "#3b6fb6",
    "kernel": "#7b4fa3",
    "other": "#8fa3b8",
    "unestimated": "#c9d3dd",
    "waits for links": "#d1495b",
    "waits for memory": "#edae49",
    "all-gather": "#e07b39",
    "reduce-scatter": "#4f9d69",
    "all-reduce": "#9c6644",
    "collective-permute": "#2a9d8f",
    "all-to-all": "#b5838d",
    "transfer": "#6c757d",
}
PANELS = 3  # the step, and a round of each of the loops that take most of it
LEAST = 1 / 20000  # of a panel's width: what is nearer and of one kind is drawn as one
LABELLED = 0.045  # of a panel's width: what is wider bears its seconds


class Bar(NamedTuple):
    """half: 0 for all of the row's height; +1 or -1 for the upper or lower half: a direction of the links."""

    row: str
    kind: str
    start: float
    seconds: float
    half: int


def bars(schedule: Schedule, origin: float = 0.0) -> Iterator[Bar]:
    """All of a schedule, loops round by round."""
    for lane, kind, start, seconds, _ in schedule.spans:
        yield Bar(lane, "waits for memory" if kind == "wait" else kind, origin + start, seconds, 0)
    for c, start, _, exposed, waits_at in schedule.transfers:
        if exposed > 0:
            yield Bar("core", "waits for links", origin + waits_at, exposed, 0)
        half = {"+": 1, "-": -1}.get(c.direction, 0)
        for axis in c.axes:
            yield Bar(axis, c.kind, origin + start, c.seconds, half)
    for rounds in schedule.inner:
        for i in range(rounds.n):
            yield from bars(rounds.each, origin + rounds.start + i * rounds.each.seconds)


def largest_loops(schedule: Schedule, n: int) -> list[Rounds]:
    """Those in which, without the loops within them, most of the time is spent, in order of execution."""
    found: list[tuple[float, Rounds]] = []

    def visit(each: Schedule, times: int) -> None:
        for rounds in each.inner:
            own = rounds.each.seconds - sum(deeper.n * deeper.each.seconds for deeper in rounds.each.inner)
            if rounds.n > 1:
                found.append((times * rounds.n * own, rounds))
            visit(rounds.each, times * rounds.n)

    visit(schedule, 1)
    chosen = sorted(found, key=lambda item: -item[0])[:n]
    return [rounds for item in found if item in chosen for rounds in (item[1],)]


def merged(row: list[Bar], width: float) -> list[Bar]:
    """Neighbours of one kind as one, where nobody could tell them apart."""
    out: list[Bar] = []
    for bar in sorted(row, key=lambda each: each.start):
        before = out[-1] if out else None
        end = before.start + before.seconds if before else 0.0
        if before and before.kind == bar.kind and before.half == bar.half and bar.start - end < LEAST * width:
            out[-1] = before._replace(seconds=max(end, bar.start + bar.seconds) - before.start)
        else:
            out.append(bar)
    return out


def draw(simulated: Simulated, title: str, path: Path) -> None:
    """Writes the picture, in the format that the file's suffix names.

    Raises:
        ConfigError: matplotlib is missing, or knows no such format.
    """
    try:
        import matplotlib
    except ImportError:
        check(False, "--timeline: needs matplotlib: pip install 'mutransformer[plots]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    formats = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    check(path.suffix[1:] in formats, f"--timeline {path}: no such format; use .png, .svg or .pdf")
    schedule = simulated.schedules[COSTINGS[0]]
    rows = ["core", *(axis for axis, size in simulated.case.sizes.items() if size > 1), "hbm"]
    panels: list[tuple[str, Schedule]] = [(f"{title}: one step, {_time(schedule.seconds)}", schedule)]
    for rounds in largest_loops(schedule, PANELS - 1):
        name = "backward" if "transpose" in rounds.label else "forward" if "jvp" in rounds.label else "loop"
        panels.append((f"one round of {rounds.n} ({name}), {_time(rounds.each.seconds)}", rounds.each))
    figure, plots = pyplot.subplots(len(panels), 1, figsize=(14, 0.6 + (0.42 * len(rows) + 0.85) * len(panels)), squeeze=False)
    kinds: set[str] = set()
    for plot, (text, each) in zip(plots[:, 0], panels, strict=True):
        kinds |= _panel(plot, text, each, rows)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight() + 0.02, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(plot: Any, text: str, schedule: Schedule, rows: list[str]) -> set[str]:
    scale, unit = (1e3, "ms") if schedule.seconds >= 1e-3 else (1e6, "µs")
    drawn = [bar for bar in bars(schedule) if bar.row in rows]
    for place, row in enumerate(reversed(rows)):
        mine = merged([bar for bar in drawn if bar.row == row], schedule.seconds)
        for kind, colour in COLOURS.items():
            for half in (0, 1, -1):
                chosen = [bar for bar in mine if (bar.kind, bar.half) == (kind, half)]
                if not chosen:
                    continue
                height = 0.8 if half == 0 else 0.4
                bottom = place - 0.4 if half <= 0 else place
                spans = [(b.start * scale, b.seconds * scale) for b in chosen]
                plot.broken_barh(spans, (bottom, height), facecolors=colour, linewidth=0, snap=False)
        for bar in mine:
            if bar.seconds > LABELLED * schedule.seconds and not bar.half:
                middle = (bar.start + bar.seconds / 2) * scale
                plot.text(middle, place, _time(bar.seconds), ha="center", va="center", fontsize=7, color="white")
    names = {"core": "compute", "hbm": "HBM to VMEM"}
    plot.set_yticks(range(len(rows)), [names.get(row, f"links {row}") for row in reversed(rows)])
    plot.set_xlim(0, schedule.seconds * scale)
    plot.set_ylim(-0.5, len(rows) - 0.5)
    plot.set_title(text, loc="left", fontsize=10)
    plot.set_xlabel(unit, loc="right", labelpad=-8, fontsize=8)
    plot.tick_params(labelsize=8)
    plot.spines[["top", "right"]].set_visible(False)
    return {bar.kind for bar in drawn}


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
