"""TensorBoard files of a study: one TensorBoard run for each training run, model size or set of figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


def open_writer(folder: Path, name: str, **options: Any) -> SummaryWriter:
    """A writer below folder/tensorboard; TensorBoard shows it as `name`. A context manager."""
    return SummaryWriter(str(folder / "tensorboard" / name.replace("/", "_")), **options)


def write_result(writer: SummaryWriter, settings: Mapping[str, object], tag: str, value: float, step: int) -> None:
    """Writes a result and the settings that gave it, for TensorBoard's table of hyperparameters."""
    kept = {key: setting for key, setting in settings.items() if isinstance(setting, bool | int | float | str)}
    writer.add_hparams(kept, {tag: value}, name=".", global_step=step)  # another name would be another run, in a subfolder
