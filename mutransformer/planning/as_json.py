"""Plans as plain data for --json: bytes, seconds and FLOPs, of one chip and one step unless the key says otherwise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mutransformer.planning.chips import HBM_EFFICIENCY
from mutransformer.planning.compiled.cost_model import LATENCY
from mutransformer.planning.compiled.simulate import ACCURACY, COSTINGS, Simulated, Totals, model_flops
from mutransformer.planning.estimate.bounds import Estimate


def plan_json(estimate: Estimate, by_remat: Mapping[str, Estimate], simulated: Simulated | None) -> dict[str, Any]:
    """The scenario with the constants used, the estimate, and the compiled step if there is one."""
    scenario, chip, c = estimate.scenario, estimate.scenario.topology.chip, estimate.scenario.config
    memory_by_remat = {"by_remat": {policy: each.memory for policy, each in by_remat.items()}} if by_remat else {}
    return {
        "name": c.name,
        "topology": str(scenario.topology),
        "chips": scenario.topology.size,
        "mesh": scenario.mesh_sizes,
        "remat": c.model.remat,
        "grad_accumulation_steps": c.optim.grad_accumulation_steps,
        "parameters": estimate.parameters,
        **_pick(c, "tokens_per_step", "steps"),
        "chip": {
            **_pick(chip, "peak_flops", "clock", "hbm_bytes", "hbm_bandwidth"),
            "hbm_efficiency": HBM_EFFICIENCY,
            "ici_bandwidth_of_an_axis": chip.ici_bandwidth,
            "collective_latency": LATENCY,
        },
        "estimate": _estimate_json(estimate) | memory_by_remat,
        **({"compiled": _simulated_json(simulated, estimate)} if simulated else {}),
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    keys = ("kind", "axes", "count", "bytes", "wire_bytes", "seconds")
    return {
        **_pick(estimate, "memory", "peak_bytes", "fits", "flops", "hbm_bytes", "bounds", "bound", "unknown_kernels"),
        "collectives": [{"of": each.purpose, **_pick(each, *keys)} for each in estimate.traffic],
        "step_seconds_at_least": estimate.seconds,
        "step_seconds_guess": estimate.guess,
        "mfu_at_most": estimate.mfu(estimate.seconds),
        "run_at_least": estimate.run(estimate.seconds),
    }


def _simulated_json(simulated: Simulated, estimate: Estimate) -> dict[str, Any]:
    """The keys mfu and mfu_6n are the conventions of `model_flops`."""
    flops, n_chips = model_flops(simulated.scenario), simulated.scenario.topology.size
    costings = {}
    for costing in COSTINGS:
        mfu = {name: simulated.mfu(costing, each) for name, each in flops.items()}
        costings[costing] = mfu | _totals_json(simulated.totals[costing])
    return {
        "compile_seconds": simulated.compile_seconds,
        **_pick(simulated, "memory", "peak_bytes", "fits"),
        "step_seconds": simulated.seconds,
        "model_flops": {name: each * n_chips for name, each in flops.items()},
        "costings": costings,
        "run": estimate.run(simulated.seconds),
        "warnings": simulated.totals[COSTINGS[0]].warnings,
        "trust": ACCURACY,
    }


def _totals_json(t: Totals) -> dict[str, Any]:
    kinds = ("matmul", "kernel", "other", "unestimated")
    return {
        "step_seconds": t.seconds,
        **_pick(t, "compute_seconds", "communication_seconds", "exposed_seconds"),
        **{f"{kind}_seconds": t.by_kind[kind] for kind in kinds},
        "memory_wait_seconds": t.by_kind["wait"],
        "collectives": [
            {"kind": key.kind, "axes": key.axes, "group": key.n, "async": key.is_async, **dataclasses.asdict(sums)}
            for key, sums in t.collectives.items()
        ],
        "top": [{"kind": kind, "source": source, "seconds": s} for (kind, source), s in list(t.costliest.items())[:20]],
    }


def _pick(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
