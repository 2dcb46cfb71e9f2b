"""Scores of lm-evaluation-harness for a run: its model is exported to a temporary folder, which the harness reads."""

import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError, check, translate_errors
from mutransformer.exchange.parity import libraries
from mutransformer.exchange.to_hf import export_run


def evaluate_tasks(
    config: Config, tasks: Sequence[str], limit: int | None = None, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The harness's results by task and metric, for the checkpoint that eval.checkpoint names, in float32.

    Args:
        tasks: names of the harness's tasks, or YAML files of one.
        limit: examples of each task at most; None: all.
        note: called with each line of progress.

    Raises:
        ConfigError: the run cannot be exported; there is no such task; the harness is not installed.
    """
    try:
        harness, task_lists = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ImportError:
        raise ConfigError("--tasks needs lm_eval: pip install 'mutransformer[lm-eval]'") from None
    files = [Path(task) for task in tasks if Path(task).is_file()]
    with translate_errors("--tasks", (OSError, ValueError, KeyError)):
        manager = task_lists.TaskManager(include_path=[str(path.resolve().parent) for path in files] or None)
    names = [_name(task) for task in tasks]
    missing = [name for name in names if name not in manager.all_tasks]
    check(not missing, f"--tasks {','.join(missing)}: no such task; `lm-eval ls tasks` lists them")
    with libraries() as (torch, _), tempfile.TemporaryDirectory() as work:
        out = Path(work) / "model"
        export_run(config, out, read_data=False, note=note)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with translate_errors(f"--tasks {','.join(names)}", (OSError, ValueError, KeyError)):
            found = harness.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(out), "dtype": "float32"},
                tasks=names,
                task_manager=manager,
                limit=limit,
                device=device,
                batch_size=config.data.batch_size,
            )
    assert found is not None
    return {"results": found["results"], "samples": found["samples"]}


def _name(task: str) -> str:
    """The name of a task, which a file of it states."""
    path = Path(task)
    if not path.is_file():
        return task
    lines = path.read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("task:")), None)
    check(name is not None, f"--tasks {task}: the file names no task")
    return str(name)
