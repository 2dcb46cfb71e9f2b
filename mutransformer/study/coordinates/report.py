"""Runs a coordinate check and its control and reports the results: CSV, figures, TensorBoard, a table of slopes, verdicts."""

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mutransformer.study.coordinates.measure import Coordinate, measure
from mutransformer.study.coordinates.slopes import KINDS, SlopeFit, fit_slopes
from mutransformer.study.coordinates.verdicts import Limits, judge
from mutransformer.study.sweep.grid import Axis, VariantConfig
from mutransformer.study.tensorboard import open_writer
from mutransformer.study.verdict import Verdict
from mutransformer.training.program import prepare_data

TABLE = "coordinates.csv"
Configs = Sequence[VariantConfig]  # one for each width or depth

_log = logging.getLogger(__name__)


def coordinate_check(
    subject: Configs, control: Configs, axis: Axis, seeds: Sequence[int], steps: int, limits: Limits, folder: Path
) -> list[Verdict]:
    """Measures every config of the checked parametrization and of one that should fail (empty: none), and judges the result.

    Writes coordinates.csv, figures as PNG and SVG, and TensorBoard files to the folder. Raises ConfigError if a setting does not
    fit the data or matplotlib is not installed.
    """
    from mutransformer.study import figures  # needs matplotlib, which is an extra
    from mutransformer.study.coordinates import plots

    folder.mkdir(parents=True, exist_ok=True)  # fails before measuring, not after
    found: list[Coordinate] = []
    for variant in (*subject, *control):
        at = variant.config.model.d_model if axis == "width" else variant.config.model.n_layer
        found += measure(variant, at, seeds, steps, prepare_data(variant.config))
        _log.info("measured %s at %s %d", variant.name, axis, at)
    write_csv(found, folder / TABLE)
    fits = fit_slopes(found)
    name, control_name = subject[0].name, control[0].name if control else None
    images = {kind: folder / f"coordinates_{kind}.png" for kind in KINDS}
    for kind, path in images.items():
        figures.save(plots.coordinates, [fit for fit in fits if fit.kind == kind], name, control_name, axis, path=path)
    _write_tensorboard(found, folder, images)
    _print_slopes(fits, axis, steps)
    return judge(fits, name, control_name, axis, limits)


def write_csv(coordinates: Sequence[Coordinate], path: Path) -> None:
    """One line for each, below a line of column names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Coordinate))
        writer.writerows((*astuple(c)[:-1], f"{c.value:.6g}") for c in coordinates)


def _print_slopes(fits: Sequence[SlopeFit], axis: Axis, steps: int) -> None:
    """Prints slopes and their spread over seeds: a row for each variant, kind and name, a column for a few of the steps."""
    shown = sorted({0, 1, 2, steps // 2, steps} & set(range(steps + 1)))
    cells = {(fit.variant, fit.kind, fit.name, fit.step): str(fit) for fit in fits}
    table = Table(f"slope over {axis}", "", "", *(f"step {step}" for step in shown), box=None, pad_edge=False)
    for row in dict.fromkeys(key[:-1] for key in cells):
        table.add_row(*row, *(cells.get((*row, step), "") for step in shown))
    Console(width=200, markup=False, highlight=False).print(table)


def _write_tensorboard(coordinates: Sequence[Coordinate], folder: Path, images: Mapping[str, Path]) -> None:
    """Curves over steps, means over seeds, one TensorBoard run for each variant and size; and the figures."""
    from PIL import Image  # a dependency of matplotlib

    curves: dict[str, dict[tuple[str, int], list[float]]] = {}
    for c in coordinates:
        curves.setdefault(f"{c.variant} {c.at}", {}).setdefault((f"{c.kind}/{c.name}", c.step), []).append(c.value)
    for name, points in curves.items():
        with open_writer(folder, name) as writer:
            for (tag, step), values in points.items():
                writer.add_scalar(tag, float(np.mean(values)), step)
    with open_writer(folder, "figures") as writer:
        for kind, path in images.items():
            writer.add_image(f"coordinates/{kind}", np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")
