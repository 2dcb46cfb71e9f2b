"""TensorBoard files of a study: one TensorBoard run for each training run, model size or set of figures."""

from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


def open_writer(folder: Path, name: str, **options: Any) -> SummaryWriter:
    """A writer below folder/tensorboard; TensorBoard shows it as `name`. A context manager."""
    return SummaryWriter(str(folder / "tensorboard" / name.replace("/", "_")), **options)
