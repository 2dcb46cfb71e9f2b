"""The report: runs each section in a process of its own, and writes the folder. Does not import JAX.

A process of its own, so that a crash of a driver, a hang or a full memory ends one section: the others run, and the report says
what happened. Each has a limit of seconds, at which it is ended.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from mutransformer.data.workers import set_up_worker, without_signals
from mutransformer.errors import FAILED, FINISHED, ConfigError, check, first_line, redact, translate_errors
from mutransformer.study.hardware.page import page
from mutransformer.study.hardware.section import Result, Task, without_folders
from mutransformer.study.hardware.sizes import Sizes, sizes_for

PAGE, DATA = "report.md", "report.json"
FORMAT = 1
GRACE = 5.0  # seconds that a section has to end once its limit is reached
SAME = ("platform", "kind", "count", "versions", "environment")  # of the device, where a report is continued


# all: those that JAX sees; one per core: on a CPU, as `mutransformer sweep` simulates them; none: the section needs no JAX.
Devices = Literal["all", "one per core", "none"]


@dataclass(frozen=True)
class Section:
    """A part of the report: a generator function by its module and name, called with a task and the arguments."""

    name: str
    about: str
    module: str
    function: str
    arguments: Callable[[Sizes], tuple[Any, ...]]
    devices: Devices = "all"


_HERE = __name__.rpartition(".")[0]
DEVICE = Section("device", "devices, versions, environment", f"{_HERE}.device", "describe", lambda sizes: ())
SECTIONS = (
    Section(
        name="kernels",
        about="attention forward and backward against the plain formula in float32",
        module=f"{_HERE}.kernels",
        function="kernels",
        arguments=lambda sizes: (sizes.attention,),
    ),
    Section(
        name="throughput",
        about="tokens per second and MFU of the train step",
        module=f"{_HERE}.throughput",
        function="throughput",
        arguments=lambda sizes: (sizes.steps, sizes.seconds, sizes.repeats),
    ),
    Section(
        name="trace",
        about="a profiler's trace of some steps",
        module=f"{_HERE}.trace",
        function="trace",
        arguments=lambda sizes: (sizes.traced, sizes.traced_steps),
    ),
    Section(
        name="sweep",
        about="several learning rates one after another and at once",
        module=f"{_HERE}.sweep_factor",
        function="sweep_factor",
        arguments=lambda sizes: (sizes.sweep, sizes.n_rates, sizes.seconds, sizes.repeats),
        devices="one per core",
    ),
    Section(
        name="transfer",
        about="the best learning rate at two widths, shortly",
        module=f"{_HERE}.short_transfer",
        function="short_transfer",
        arguments=lambda sizes: (sizes.transfer,),
        devices="one per core",
    ),
)


def write(
    out: Path | None,
    settings: Sequence[str] = (),
    *,
    workdir: Path = Path("runs"),
    sizes: Callable[[str], Sizes] = sizes_for,
    sections: Sequence[Section] = SECTIONS,
) -> tuple[int, Path]:
    """Runs the sections that the folder does not hold yet, and writes its report.md and report.json after each.

    Args:
        out: the folder; None: in workdir/hardware, by the names of device and version.
        settings: KEY=VALUE, for every config of the report.
        sizes: by platform.

    Returns FINISHED, or FAILED if a section failed, and the folder. Raises ConfigError if the folder holds something else, or a
    report of other devices, versions or settings, or JAX finds no devices.
    """
    if out is not None:
        _held(out)
    with tempfile.TemporaryDirectory(prefix="mutransformer-report-") as scratch:
        run = partial(_run, settings=tuple(settings), scratch=Path(scratch))
        _say("devices and versions")
        found = run(DEVICE, sizes("cpu"), folder=Path(scratch))
        check(found["status"] == "finished", f"no devices: {found['error']}")
        device = found["result"]
        folder = out or workdir / "hardware" / device["name"]
        report = _held(folder) or {"format": FORMAT, "device": device, "settings": _shown(settings), "sections": {}}
        _check_same(folder, report, device, settings)
        chosen = sizes(device["platform"])
        report["limits"] = {section.name: _limit(chosen, section) for section in (DEVICE, *sections)}
        folder.mkdir(parents=True, exist_ok=True)
        _say(f"{device['count']} x {device['kind']}; {_minutes(sum(report['limits'].values()))} at most; writes {folder}")
        for i, section in enumerate(sections, start=1):
            title = f"[{i}/{len(sections)}] {section.name}: {section.about}"
            if report["sections"].get(section.name, {}).get("status") == "finished":
                _say(f"{title}: done before")
                continue
            _say(f"{title}; at most {_limit(chosen, section):.0f} s")
            done = run(section, chosen, folder=folder)
            report["sections"][section.name] = done
            _store(folder, report)
            _say(f"      {done['status']} after {done['seconds']:.0f} s{': ' + done['error'] if done['error'] else ''}")
        _store(folder, report)
    failed = [name for name, each in report["sections"].items() if each["status"] == "failed"]
    return FAILED if failed else FINISHED, folder


def _limit(sizes: Sizes, section: Section) -> float:
    return sizes.limits.get(section.name, 60.0)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def _shown(settings: Sequence[str]) -> list[str]:
    return [without_folders(redact(setting)) for setting in settings]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _held(out: Path) -> dict[str, Any] | None:
    """The report that a folder holds; None if the folder is missing or empty. Raises ConfigError if it holds something else."""
    check(not out.exists() or out.is_dir(), f"--out {out}: is a file")
    if not out.exists() or not any(out.iterdir()):
        return None
    other = f"--out {out}: holds something other than a report; choose another folder"
    check((out / DATA).is_file(), other)
    with translate_errors(f"--out {out}: cannot read {DATA}", (OSError, ValueError)):
        report = json.loads((out / DATA).read_text(encoding="utf-8"))
    check(isinstance(report, dict) and report.get("format") == FORMAT, other)
    return report


def _check_same(out: Path, report: Mapping[str, Any], device: Mapping[str, Any], settings: Sequence[str]) -> None:
    differing = [key for key in SAME if report["device"][key] != device[key]]
    differing += ["settings"] if report["settings"] != _shown(settings) else []
    text = f"--out {out}: holds a report with other {', '.join(differing)}; choose another folder"
    check(not differing, text)


def _store(out: Path, report: Mapping[str, Any]) -> None:
    for name, text in ((DATA, json.dumps(report, indent=1) + "\n"), (PAGE, page(report))):
        new = out / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, out / name)


def _run(section: Section, sizes: Sizes, settings: tuple[str, ...], scratch: Path, folder: Path) -> Result:
    """The outcome of a section in a process of its own: status (finished or failed), seconds, limit, error, result."""
    began, limit = time.monotonic(), _limit(sizes, section)
    path = scratch / f"{section.name}.json"
    arguments = section.module, section.function, section.arguments(sizes), section.devices
    task = Task(folder, settings, began + limit, scratch)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(*arguments, task, path, scratch))
    with without_signals():
        process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        _end(process)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"result": {}}
    error = kept.get("error")
    if late:
        error = f"not finished within its limit of {limit:.0f} s"
    elif process.exitcode and error is None:
        code = process.exitcode
        error = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
    status = "failed" if error is not None else "finished"
    return {"status": status, "error": error, "seconds": time.monotonic() - began, "limit": limit, "result": kept["result"]}


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
        process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join()


def _child(
    module: str, function: str, arguments: tuple[Any, ...], devices: Devices, task: Task, path: Path, scratch: Path
) -> None:
    """In the section's process: writes each result that the section gives, and the error that ended it."""
    set_up_worker()
    kept: dict[str, Any] = {"result": {}}
    try:
        if devices != "none":
            _start_jax(devices, scratch)
        task = replace(task, say=lambda text: _say(f"      {text}"))
        results: Iterator[Result] = getattr(import_module(module), function)(task, *arguments)
        for kept["result"] in results:
            _keep(path, kept)
    except Exception as error:  # of whatever kind: it is in the report, and the other sections run
        name = "" if isinstance(error, ConfigError) or "Failed" in type(error).__name__ else f"{type(error).__name__}: "
        _keep(path, kept | {"error": without_folders(redact(f"{name}{first_line(error)}"))})


def _keep(path: Path, kept: Mapping[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(kept), encoding="utf-8")
    os.replace(new, path)


def _start_jax(which: Devices, scratch: Path) -> None:
    """Starts JAX as a run does. Compiled programs are kept for the report's other sections only: compiling is measured, too."""
    from mutransformer.sharding import compile_cache, devices, processes

    if which == "one per core":
        processes.simulate_devices(os.cpu_count() or 1)
    devices.keep_freed_memory()
    compile_cache.keep_compiled(str(scratch / "compiled"))
