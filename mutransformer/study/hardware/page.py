"""The report as one Markdown page. Pure: everything in it is in report.json."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mutransformer.mup.checks.verdict import count
from mutransformer.study.hardware.device import BUSY

TITLES = {
    "kernels": "Kernels",
    "throughput": "Throughput",
    "trace": "Trace",
    "sweep": "Sweep",
    "transfer": "Short transfer",
}
COMMAND = "mutransformer benchmark --report"


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, complete or not."""
    device = report["device"]
    lines = [f"# Hardware report: {device['count']} x {device['kind']}, JAX {device['versions']['jax']}", ""]
    lines += [*_about(report), "", *_verdicts(report), ""]
    for name, section in report["sections"].items():
        lines += [f"## {TITLES.get(name, name)}", ""]
        body = list(_BODIES[name](section["result"])) if section["result"] and name in _BODIES else []
        if body:
            lines += [*body, ""]
        if section["error"]:
            lines += [f"**Failed**: {section['error']}", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _about(report: Mapping[str, Any]) -> Iterator[str]:
    device = report["device"]
    cpu, versions, peak = device["cpu"], device["versions"], device["peak_flops"]
    speed = f"peak {peak / 1e12:.0f} TFLOP/s in bfloat16" if peak else "peak FLOP/s not known, so no MFU"
    host = " ".join(filter(None, [f"{cpu['cores']} cores", cpu["widest_instructions"], cpu["machine"], device["system"]]))
    command = " ".join([COMMAND, *report["settings"]])
    yield f"- Written by `{command}`; no host name and no path is in it."
    memory = f"{device['memory_bytes'] / 1e9:.1f} GB each"
    yield f"- Devices: {device['count']} x {device['kind']}, {memory}; {speed}; computes in {device['compute']}."
    yield f"- Host: {host}; Python {device['python']}."
    yield f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    flags = " ".join(f"`{name}={text}`" for name, text in device["environment"].items())
    yield f"- Environment: {flags or 'no variable of XLA or JAX is set'}."
    load = cpu["load_average"]
    if load is not None:
        idle = load <= BUSY * cpu["cores"]
        doubt = "" if idle else " **The machine was not idle: times here are too long, and comparisons between them uncertain.**"
        yield f"- Load average at the start: {load:.1f} on {cpu['cores']} cores.{doubt}"


def _verdicts(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [TITLES.get(name, name), _outcome(name, each), f"{each['seconds']:.0f} of {each['limit']:.0f}"]
        for name, each in report["sections"].items()
    ]
    total = sum(each["seconds"] for each in report["sections"].values())
    return [*table(["section", "result", "seconds, limit"], rows), "", f"All sections together: {total:.0f} s."]


def _outcome(name: str, section: Mapping[str, Any]) -> str:
    if section["error"]:
        return f"failed: {section['error']}"
    return _SUMMARIES[name](section["result"]) if name in _SUMMARIES else "finished"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def _kernels(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Attention in {result['dtype']}, {result['rows']} rows of {result['positions']} positions, heads of {result['d_head']}: "
        f"output and three gradients against the plain formula in float32, |difference| / |plain| by norm. At most "
        f"{result['tolerance']:g} is allowed. The control is the plain formula with a wrong mask."
    )
    yield ""
    rows = [
        [
            each["kernel"],
            f"{each['heads']} / {each['kv_heads']}",
            "apart" if each["documents"] else "one",
            f"{each['distance']:.1e}",
            each["worst"],
            f"{each['control']:.2f}",
        ]
        for each in result["cases"]
    ]
    yield from table(["kernel", "heads / of keys", "documents of a row", "largest difference", "of", "control"], rows)
    yield from _left_out(result)


def _throughput(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"The train step on random tokens that stay on the devices: median of {result['repeats']} repeats of "
        f"{result['seconds']:g} s, in brackets their range. Compilation does not count."
    )
    yield ""
    rows = []
    for each in result["sizes"]:
        low, high = each["range"]
        peak = each["peak_bytes"]
        rows.append(
            [
                each["name"],
                f"{each['parameters'] / 1e6:.4g} M",
                f"{each['rows']} x {each['positions']}",
                f"{each['attention']}, {each['compute']}, {each['remat']}",
                f"{each['tokens_per_second']:,} ({low:,} to {high:,})",
                "–" if each["mfu"] is None else f"{each['mfu']:.1%}",
                f"{each['model_flops_per_second'] / 1e12:.3g}",
                f"{each['compile_seconds']:.0f}",
                "–" if peak is None else f"{peak / 1e9:.1f}",
            ]
        )
    yield from table(
        [
            "size",
            "parameters",
            "rows x positions",
            "attention, dtype, remat",
            "tokens/s",
            "MFU",
            "model TFLOP/s",
            "compiling, s",
            "peak memory, GB",
        ],
        rows,
    )
    yield ""
    yield from _predictions(result)
    yield from _left_out(result)


def _predictions(result: Mapping[str, Any]) -> Iterator[str]:
    yield "Beside `mutransformer plan`, seconds of a step, and GB of a device:"
    yield ""
    rows = []
    for each in result["sizes"]:
        p = each["predicted"]
        bound = f"{p['seconds_at_least']:.4g} ({p['bound']})" if "bound" in p else "–"
        rows.append(
            [
                each["name"],
                f"{each['step_seconds']:.4g}",
                bound,
                _number(p.get("seconds_guess")),
                _number(p.get("seconds_simulated")),
                _number(p.get("measured_over_simulated")),
                f"{p['peak_bytes_estimated'] / 1e9:.3g}",
                f"{p['peak_bytes_compiled'] / 1e9:.3g}",
            ]
        )
    yield from table(
        [
            "size",
            "measured",
            "at least (bound by)",
            "guess",
            "simulated",
            "measured / simulated",
            "memory, estimated",
            "memory, compiled",
        ],
        rows,
    )
    if not any("bound" in each["predicted"] for each in result["sizes"]):
        yield ""
        yield "The planner has no figures for this kind of device, and so predicts no times."
    for each in result["sizes"]:
        if "not_simulated" in each["predicted"]:
            yield f"\n{each['name']} could not be simulated: {each['predicted']['not_simulated']}"


def _trace(result: Mapping[str, Any]) -> Iterator[str]:
    steps, traced, untraced = result["steps"], result["step_seconds"], result["untraced_step_seconds"]
    yield (
        f"{steps} steps of {result['name']}, {result['rows']} rows of {result['positions']} positions, on {result['device']}: "
        f"{traced:.4g} s a step in the trace, {untraced:.4g} s without a profiler just before."
    )
    low, high = result["idle_of_devices"]
    if low != high:
        yield f"Of all devices, the idle time lies between {low:.1%} and {high:.1%}."
    yield ""
    yield from table(["what ran", "share of the time"], [[kind, f"{share:.1%}"] for kind, share in result["shares"].items()])
    yield ""
    yield "Where operations run beside each other, the first in this table counts: that of collectives is what nothing hides."
    yield ""
    rows = [
        [f"`{each['from']}`", each["category"], f"{1e3 * each['seconds_per_step']:.3g}", f"{each['runs_per_step']:.3g}"]
        for each in result["longest"]
    ]
    yield from table(["longest operations", "category", "ms a step", "runs a step"], rows)
    yield ""
    yield result["gaps"]["words"]
    if result["gaps"]["longest"]:
        yield ""
        yield from (f"- {gap['words']}." for gap in result["gaps"]["longest"])


def _sweep(result: Mapping[str, Any]) -> Iterator[str]:
    n, devices = result["rates"], count(result["devices"], "device")
    yield (
        f"`configs/study.yaml`: {n} learning rates at once on {devices}, against {n} times one run "
        f"alone on one; medians of {result['repeats']} repeats in turns, in brackets the range of the factor over pairs."
    )
    yield ""
    rows = []
    for each in result["sizes"]:
        pairs = [n * a / b for a, b in zip(each["alone_repeats"], each["together_repeats"], strict=True)]
        rows.append(
            [
                each["name"],
                f"{1e3 * each['alone_seconds']:.3g}",
                f"{1e3 * each['together_seconds']:.3g}",
                f"**{each['factor']:.2f}** ({min(pairs):.2f} to {max(pairs):.2f})",
                "vectorized" if each["vectorized"] else "one after another on each device",
                f"{each['compile_seconds'][0]:.0f}, {each['compile_seconds'][1]:.0f}",
            ]
        )
    yield from table(
        ["size", "one run, ms a step", f"{n} runs, ms a step", "factor", f"how the {n} are computed", "compiling, s"], rows
    )
    yield from _left_out(result)


def _transfer(result: Mapping[str, Any]) -> Iterator[str]:
    run = f"{result['steps']} steps of {result['tokens_per_step']} tokens, one seed, {result['compute']}"
    yield f"`configs/study.yaml` on the embedded text, {run}; validation loss in nats per token. {result['caveat']}"
    yield ""
    rates = [f"2^{rate:g}" for rate in result["rates"]]
    rows = [
        [
            each["rule"],
            size["width"],
            *(_loss(loss, size["best_loss"]) for loss in size["losses"]),
            size["optimum"],
            _number(size["penalty"], "{:.3f}"),
        ]
        for each in result["rules"]
        for size in each["sizes"]
    ]
    yield from table(["rule", "width", *rates, "optimum, log2", "penalty"], rows)
    yield ""
    yield "The penalty is what the narrower width's best rate costs at this width, in nats."
    yield from (f"- `{each['rule']}`: {each['words']}." for each in result["rules"])
    yield from _left_out(result)


def _left_out(result: Mapping[str, Any]) -> Iterator[str]:
    if result["left_out"]:
        yield ""
        yield from (f"- Left out: {text}." for text in result["left_out"])


def _loss(loss: float | None, best: float | None) -> str:
    return "diverged" if loss is None else f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(value)


def _said_of_kernels(result: Mapping[str, Any]) -> str:
    worst = max((each["distance"] for each in result["cases"]), default=math.nan)
    return f"{len(result['cases'])} comparisons within {result['tolerance']:g} (largest {worst:.1e})"


def _said_of_throughput(result: Mapping[str, Any]) -> str:
    parts = [
        f"{each['name']}: {each['tokens_per_second']:,} tokens/s" + ("" if each["mfu"] is None else f", MFU {each['mfu']:.1%}")
        for each in result["sizes"]
    ]
    return "; ".join(parts)


def _said_of_trace(result: Mapping[str, Any]) -> str:
    shares = [f"{kind} {share:.0%}" for kind, share in result["shares"].items() if share >= 0.005]
    return ", ".join(shares)


def _said_of_sweep(result: Mapping[str, Any]) -> str:
    return "; ".join(f"{each['name']}: {each['factor']:.2f} times faster" for each in result["sizes"])


def _said_of_transfer(result: Mapping[str, Any]) -> str:
    said = []
    for each in result["rules"]:
        best = " and ".join(f"2^{size['best_rate']:g}" for size in each["sizes"])
        said.append(
            f"{each['rule']}: best of the grid {best} at widths {' and '.join(str(size['width']) for size in each['sizes'])}"
        )
    return "; ".join(said)


_BODIES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "kernels": _kernels,
    "throughput": _throughput,
    "trace": _trace,
    "sweep": _sweep,
    "transfer": _transfer,
}
_SUMMARIES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "kernels": _said_of_kernels,
    "throughput": _said_of_throughput,
    "trace": _said_of_trace,
    "sweep": _said_of_sweep,
    "transfer": _said_of_transfer,
}
