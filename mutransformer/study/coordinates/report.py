"""Runs a coordinate check and its control, and writes down what they gave: CSV, figures, TensorBoard, verdicts."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from mutransformer.data.cache.prepare import prepare
from mutransformer.sharding.processes import all_processes
from mutransformer.study.coordinates.measure import Axis, Coordinate, measure
from mutransformer.study.coordinates.slopes import KINDS, Limits, Line, judge, lines, table
from mutransformer.study.sweep.grid import Job
from mutransformer.study.verdicts import Verdict

TABLE, FIGURES = "coordinates.csv", "coordinates"

_log = logging.getLogger(__name__)


def coordinate_check(
    subject: Sequence[Job], control: Sequence[Job], axis: Axis, seeds: Sequence[int], steps: int, limits: Limits, folder: Path
) -> list[Verdict]:
    """Measures every job and judges them.

    Args:
        subject: the parametrization that is checked, a job for each width or depth.
        control: one that must fail, likewise; empty for none.
        axis: what varies over the jobs.
        seeds, steps: as coord.measure takes them.
        limits: what passes.
        folder: for coordinates.csv, figures as PNG and SVG, and TensorBoard.

    Returns:
        Verdicts on the subject and on the control.

    Raises:
        ConfigError: a setting does not fit the data; matplotlib is not installed.
    """
    from mutransformer.study.coordinates import plots as coord_plots
    from mutransformer.study.transfer import plots  # need matplotlib, which is an extra

    folder.mkdir(parents=True, exist_ok=True)  # now, not when there are numbers to lose
    found: list[Coordinate] = []
    for job in (*subject, *control):
        at = job.config.model.d_model if axis == "width" else job.config.model.n_layer
        corpus = prepare(job.config.data, all_processes())
        job = Job(job.variant, job.config.with_vocab(corpus.tokenizer.n_vocab))
        found += measure(job, at, seeds, steps, corpus)
        _log.info("%s, %s %d: measured", job.variant, axis, at)
    write(found, folder / TABLE)
    of = lines(found)
    name, against = subject[0].variant, control[0].variant if control else None
    for kind in KINDS:
        chosen = [line for line in of if line.kind == kind]
        plots.save(coord_plots.coordinates, chosen, name, against, axis, path=folder / f"{FIGURES}_{kind}")
    _tensorboard(found, folder, [(kind, folder / f"{FIGURES}_{kind}.png") for kind in KINDS])
    _log.info("%s", in_columns(of, axis, steps))
    return judge(of, name, against, axis, limits)


def write(coordinates: Sequence[Coordinate], path: Path) -> None:
    """A line of CSV for each."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Coordinate))
        writer.writerows((*astuple(c)[:-1], f"{c.value:.6g}") for c in coordinates)


def in_columns(of: Sequence[Line], axis: Axis, steps: int) -> str:
    """The table of slopes at a few steps, for the console."""
    chosen = sorted({0, 1, 2, steps // 2, steps} & set(range(steps + 1)))
    head = [f"slope over {axis}", "", "", *(f"step {step}" for step in chosen)]
    rows = [head, *table(of, chosen)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _tensorboard(coordinates: Sequence[Coordinate], folder: Path, figures: Sequence[tuple[str, Path]]) -> None:
    """A run for each variant and size with curves over steps, mean over seeds; and the figures."""
    from PIL import Image  # matplotlib needs it too

    curves: dict[tuple[str, int], dict[tuple[str, str, int], list[float]]] = {}
    for c in coordinates:
        curves.setdefault((c.variant, c.at), {}).setdefault((c.kind, c.name, c.step), []).append(c.value)
    for (variant, at), values in curves.items():
        with SummaryWriter(str(folder / "tensorboard" / f"{variant} {at}".replace("/", "_"))) as writer:
            for (kind, name, step), seeds in values.items():
                writer.add_scalar(f"{kind}/{name}", float(np.mean(seeds)), step)
    with SummaryWriter(str(folder / "tensorboard" / "figures")) as writer:
        for kind, path in figures:
            writer.add_image(f"coordinates/{kind}", np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")


def read(path: Path) -> list[Coordinate]:
    """What write has written."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Coordinate(r["variant"], int(r["at"]), int(r["seed"]), int(r["step"]), r["kind"], r["name"], float(r["value"]))  # pyright: ignore[reportArgumentType]
        for r in rows
    ]
