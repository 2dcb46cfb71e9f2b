"""A picture of one compiled step: what the core, the links of each mesh axis and the memory do over time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mutransformer.errors import ConfigError, check
from mutransformer.planning.compiled.replay import Loop, Schedule
from mutransformer.planning.compiled.simulate import Simulated, loop_name
from mutransformer.planning.tables import format_seconds

COLORS = {
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
PANELS = 3  # the step, and one round of each of the most expensive loops
MERGED = 1 / 20000  # fraction of a panel's width: bars of one kind that are closer are drawn as one
LABELED = 0.045  # fraction of a panel's width: wider bars show their duration


class Bar(NamedTuple):
    """half: 0 for the row's full height; +1 or -1 for its upper or lower half, a direction of the links."""

    row: str
    kind: str
    start: float
    seconds: float
    half: int


def bars(schedule: Schedule, origin: float = 0.0) -> Iterator[Bar]:
    """The bars of a schedule, each round of its loops included."""
    for span in schedule.spans:
        kind = {"wait": "waits for memory", "exposed": "waits for links"}.get(span.kind, span.kind)
        yield Bar(span.lane, kind, origin + span.start, span.seconds, 0)
    for c, start, *_ in schedule.transfers:
        half = {"+": 1, "-": -1}.get(c.direction, 0)
        yield from (Bar(axis, c.kind, origin + start, c.seconds, half) for axis in c.axes)
    for loop in schedule.loops:
        for i in range(loop.n):
            yield from bars(loop.body, origin + loop.start + i * loop.body.seconds)


def most_expensive_loops(schedule: Schedule, n: int) -> list[Loop]:
    """The n loops that take most of the time, without the loops nested in them; in the order of execution."""
    loops = [(loop, times) for each, times in schedule.flat() for loop in each.loops if loop.n > 1]

    def exclusive(item: tuple[Loop, int]) -> float:
        loop, times = item
        return times * loop.n * (loop.body.seconds - sum(inner.n * inner.body.seconds for inner in loop.body.loops))

    chosen = sorted(loops, key=exclusive, reverse=True)[:n]
    return [item[0] for item in loops if item in chosen]


def merge(row: list[Bar], width: float) -> list[Bar]:
    """The bars of a row, with neighbors of one kind joined where the gap is invisible."""
    out: list[Bar] = []
    for bar in sorted(row, key=lambda each: each.start):
        last = out[-1] if out else None
        end = last.start + last.seconds if last else 0.0
        if last and (last.kind, last.half) == (bar.kind, bar.half) and bar.start - end < MERGED * width:
            out[-1] = last._replace(seconds=max(end, bar.start + bar.seconds) - last.start)
        else:
            out.append(bar)
    return out


def draw(simulated: Simulated, title: str, path: Path) -> None:
    """Draws a step into a file. Raises ConfigError if matplotlib is missing, or does not know the format of the suffix."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--timeline: needs matplotlib: pip install 'mutransformer[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.patches import Patch

    check(path.suffix[1:] in FigureCanvasBase.filetypes, f"--timeline {path}: no such format; use .png, .svg or .pdf")
    schedule = simulated.schedules[simulated.quoted]
    lanes = {span.lane for each, _ in schedule.flat() for span in each.spans}
    rows = ["core", *(axis for axis, size in simulated.scenario.mesh_sizes.items() if size > 1), *sorted(lanes - {"core"})]
    panels = [(f"{title}: one step, {format_seconds(schedule.seconds)}", schedule)]
    for loop in most_expensive_loops(schedule, PANELS - 1):
        panels.append((f"one round of {loop.n} ({loop_name(loop)}), {format_seconds(loop.body.seconds)}", loop.body))
    figure, plots = pyplot.subplots(len(panels), 1, figsize=(14, 0.6 + (0.42 * len(rows) + 0.85) * len(panels)), squeeze=False)
    kinds = set[str]().union(*(_panel(plot, *panel, rows) for plot, panel in zip(plots[:, 0], panels, strict=True)))
    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight() + 0.02, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(plot: Any, text: str, schedule: Schedule, rows: list[str]) -> set[str]:
    """Draws one schedule. Returns the kinds of its bars."""
    scale, unit = (1e3, "ms") if schedule.seconds >= 1e-3 else (1e6, "us")
    drawn = [bar for bar in bars(schedule) if bar.row in rows]
    for place, row in enumerate(reversed(rows)):
        merged = merge([bar for bar in drawn if bar.row == row], schedule.seconds)
        for kind, half in dict.fromkeys((bar.kind, bar.half) for bar in merged):
            spans = [(bar.start * scale, bar.seconds * scale) for bar in merged if (bar.kind, bar.half) == (kind, half)]
            bottom, height = (place - 0.4, 0.8) if half == 0 else (place if half > 0 else place - 0.4, 0.4)
            plot.broken_barh(spans, (bottom, height), facecolors=COLORS.get(kind, COLORS["transfer"]), linewidth=0, snap=False)
        for bar in merged:
            if bar.seconds > LABELED * schedule.seconds and not bar.half:
                middle, label = (bar.start + bar.seconds / 2) * scale, format_seconds(bar.seconds)
                plot.text(middle, place, label, ha="center", va="center", fontsize=7, color="white")
    names = {"core": "compute", "hbm": "HBM to VMEM"}
    plot.set_yticks(range(len(rows)), [names.get(row, f"links {row}") for row in reversed(rows)])
    plot.set(xlim=(0, schedule.seconds * scale), ylim=(-0.5, len(rows) - 0.5))
    plot.set_title(text, loc="left", fontsize=10)
    plot.set_xlabel(unit, loc="right", labelpad=-8, fontsize=8)
    plot.tick_params(labelsize=8)
    plot.spines[["top", "right"]].set_visible(False)
    return {bar.kind for bar in drawn}
