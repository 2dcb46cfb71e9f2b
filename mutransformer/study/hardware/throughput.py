"""Tokens per second and MFU of the train step at several sizes, beside the time that the planner predicts."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError, first_line
from mutransformer.planning.compiled.compilers import CompiledStep, compiled_memory
from mutransformer.planning.compiled.simulate import simulate
from mutransformer.planning.estimate.bounds import Estimate, estimate, make_scenario
from mutransformer.planning.kernel_flops import BUILT_IN
from mutransformer.planning.machines import this_machine
from mutransformer.study.hardware.section import Result, SectionFailed, Task
from mutransformer.study.hardware.sizes import StepSize
from mutransformer.study.hardware.step_time import StepTimer, build_alone, figures

ESTIMATE_ERROR = 1.2  # the compiler's memory over the estimate's, at most: it was within a fifth (docs/planning.md)
GROWTH = 2.0  # how much longer than the size before it a size may take: one that would not end in time is left out


def throughput(task: Task, sizes: tuple[StepSize, ...], seconds: float, repeats: int) -> Iterator[Result]:
    """Times each size on all devices, ascending; `seconds` are those of a repeat.

    Raises SectionFailed if no size could be timed. A size that does not fit into memory or time is left out, with the reason.
    """
    result: Result = {"seconds": seconds, "repeats": repeats, "sizes": [], "left_out": []}
    longest = 0.0
    for size in sizes:
        began = time.monotonic()
        if why := task.too_late_for(GROWTH * longest, f"the size before it took {longest:.0f} s"):
            result["left_out"].append(f"{size.name}: {why}")
            yield result
            continue
        try:
            config, found = fitting_rows(task, size)
            task.say(f"{size.name}: compiling the step for {config.data.batch_size} rows of {config.data.seq_len} positions")
            result["sizes"].append({"name": size.name, **timed(config, found, seconds, repeats)})
            task.say("{name}: {tokens_per_second:,} tokens/s".format(**result["sizes"][-1]))
        except ConfigError as error:
            result["left_out"].append(f"{size.name}: {error}")
        except RuntimeError as error:  # JAX's
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result["left_out"].append(f"{size.name}: out of memory: {first_line(error)}")
        longest = max(longest, time.monotonic() - began)
        yield result
    if not result["sizes"]:
        raise SectionFailed(f"no size was timed: {'; '.join(result['left_out'])}")


def fitting_rows(task: Task, size: StepSize) -> tuple[Config, Estimate]:
    """The config with as many rows on each device as fit by the planner's estimate, at most the size's, and that estimate.

    Raises ConfigError if one row does not fit.
    """
    rows, machine = size.rows, this_machine()
    while True:
        config = task.config(size.settings, f"data.batch_size={rows * machine.size}")
        found = estimate(make_scenario(config, machine), BUILT_IN)
        need = ESTIMATE_ERROR * found.peak_bytes
        if need <= found.limit:
            return config, found
        if rows == 1:
            raise ConfigError(f"needs up to {need / 1e9:.1f} GB with one row on a device, which has {found.limit / 1e9:.1f} GB")
        rows //= 2


def timed(config: Config, found: Estimate, seconds: float, repeats: int) -> Result:
    """What was measured of a config's step, and what was predicted for it."""
    timer = StepTimer(build_alone(config))
    n = timer.steps_of(seconds)
    times = [timer.seconds_per_step(n) for _ in range(repeats)]
    measured = {"steps_per_repeat": n, **figures(timer, times), "seconds_per_step": [round(each, 6) for each in times]}
    where = {"rows": config.data.batch_size, "positions": config.data.seq_len, "mesh": dict(timer.program.mesh.shape)}
    e, c = timer.program.execution, timer.program.config
    how = {"compute": c.precision.compute, "attention": e.attention, "remat": e.remat, "xla_options": dict(e.compiler_options)}
    return {**where, **how, **measured, "predicted": predicted(found, timer, statistics.median(times))}


def predicted(found: Estimate, timer: StepTimer, median: float) -> Result:
    """The planner's times and memory of a step. Devices without published figures, as CPUs are, have memory only.

    seconds_at_least: the bound by arithmetic. seconds_simulated: of the very program that ran, replayed by the planner's costs.
    """
    memory = compiled_memory(timer.compiled)
    peak = sum(size for category, size in memory.items() if category != "code")
    result: dict[str, Any] = {"peak_bytes_estimated": found.peak_bytes, "peak_bytes_compiled": peak, "limit_bytes": found.limit}
    if not found.bounds:
        return result
    result |= {"seconds_at_least": found.seconds, "bound": found.bound, "seconds_guess": found.guess}
    try:
        simulated = simulate(found.scenario, CompiledStep(timer.text or "", timer.compile_seconds, memory), BUILT_IN)
        result |= {"seconds_simulated": simulated.seconds, "measured_over_simulated": round(median / simulated.seconds, 3)}
    except ValueError as error:  # not the text of a scheduled program
        result["not_simulated"] = first_line(error)
    return result
