"""A profiler's trace of some steps, reduced to tables: shares of the time, the longest operations, the gaps in words.

The raw trace stays in the report's folder, in trace/, which Git ignores: it names the host and its folders.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mutransformer.planning.compiled.hlo import Module, parse
from mutransformer.study.hardware.section import Result, SectionFailed, Task
from mutransformer.study.hardware.sizes import StepSize
from mutransformer.study.hardware.step_time import StepTimer, build_alone
from mutransformer.study.hardware.throughput import fitting_rows
from mutransformer.study.hardware.timeline import Event, categories, gaps_in_words, in_words, timeline

FOLDER = "trace"
LONGEST, GAPS = 10, 5  # operations and gaps in the report


class Traced(NamedTuple):
    """What a trace holds of the devices, by their names, and of the host."""

    devices: dict[str, list[Event]]
    host: list[Event]


def trace(task: Task, size: StepSize, n_steps: int) -> Iterator[Result]:
    """Traces steps of a size. Raises SectionFailed if the trace has no operation of a device."""
    config, _ = fitting_rows(task, size)
    timer = StepTimer(build_alone(config))
    timer.seconds_per_step(2)
    untraced = timer.seconds_per_step(n_steps)
    path = capture(timer, n_steps, task.folder / FOLDER)
    task.say(f"{n_steps} steps of {size.name} are traced")
    result = {"name": size.name, "rows": config.data.batch_size, "positions": config.data.seq_len, "steps": n_steps}
    result |= {"untraced_step_seconds": untraced}
    text = timer.text
    module = parse(text) if text else None  # without it operations are known by their names alone
    yield result | summary(read(jax.profiler.ProfileData.from_file(str(path))), n_steps, module)


def capture(timer: StepTimer, n_steps: int, folder: Path) -> Path:
    """Traces steps of a timer into a folder. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function would be in it
    with jax.profiler.trace(str(folder), profiler_options=options):
        timer.seconds_per_step(n_steps)
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def read(data: Any) -> Traced:
    """The operations of each device and the events of the host. data: a jax.profiler.ProfileData.

    Operations of a GPU are on the lines of its streams, of a TPU on the line "XLA Ops". A CPU has no lines of its own: its
    operations are those events of the host that name an operation of the program.
    """
    devices: dict[str, list[Event]] = {}
    host: list[Event] = []
    for plane in data.planes:
        if re.match(r"/device:(GPU|TPU):\d+$", plane.name):
            own = "XLA Ops" if "TPU" in plane.name else "Stream"  # other lines repeat these, or group them
            events = [event for line in plane.lines if line.name.startswith(own) for event in line.events]
            devices[plane.name.removeprefix("/device:")] = [_event(event, _stat(event, "hlo_op")) for event in events]
        elif plane.name == "/host:CPU":
            for line in plane.lines:
                for event in line.events:
                    operation = _stat(event, "hlo_op")
                    if event.name.startswith("end: "):  # marks where an operation ended, and takes no time of its own
                        continue
                    (host if operation is None else devices.setdefault("CPU", [])).append(_event(event, operation))
    if len(devices) > 1:  # the host's own operations beside an accelerator's
        devices.pop("CPU", None)
    return Traced({name: events for name, events in devices.items() if events}, host)


def _event(event: Any, operation: str | None) -> Event:
    start = event.start_ns * 1e-9
    return Event(operation or event.name, start, start + event.duration_ns * 1e-9)


def _stat(event: Any, name: str) -> str | None:
    return next((str(value) for key, value in event.stats if key == name), None)


def summary(traced: Traced, n_steps: int, module: Module | None) -> Result:
    """The tables of a trace. Of several devices: the first, and the range of the others' idle time."""
    if not traced.devices:
        raise SectionFailed("the profiler recorded no operation of a device")
    category = categories(module)
    lines = {name: timeline(events, n_steps, module) for name, events in traced.devices.items()}
    shares = {name: line.shares(category) for name, line in lines.items()}
    name, line = next(iter(lines.items()))
    begin = min(event.start for event in traced.devices[name])
    host = [event._replace(start=event.start - begin, end=event.end - begin) for event in traced.host]
    gaps = line.gaps()
    origin = {each.name: _origin(each.name, module) for each in line.operations}
    return {
        "device": name,
        "step_seconds": line.seconds / n_steps,
        "shares": shares[name],
        "idle_of_devices": [min(each["idle"] for each in shares.values()), max(each["idle"] for each in shares.values())],
        "longest": [
            {"name": each, "from": origin[each], "category": category(each), "seconds_per_step": spent, "runs_per_step": runs}
            for each, spent, runs in line.longest(LONGEST)
        ],
        "gaps": {
            "count": len(gaps),
            "seconds": sum(gap.seconds for gap in gaps),
            "words": gaps_in_words(line, gaps),
            "longest": [{**gap._asdict(), "seconds": gap.seconds, "words": in_words(gap, host, origin)} for gap in gaps[:GAPS]],
        },
    }


def _origin(name: str, module: Module | None) -> str:
    """An operation's name, and the end of where in the program it comes from."""
    op = module.ops.get(name) if module else None
    parts = re.sub(r"closed_call|while|body|checkpoint|jit\(\w+\)", "", op.source).strip("/").split("/") if op else []
    parts = [part for part in parts if part]
    return f"{name} ({'/'.join(parts[-3:])})" if parts else name
