"""A plan as plain data, for --json: bytes, seconds, FLOPs; of one chip and one step where nothing else is said."""

from typing import Any

from mutransformer.planning.comm import LATENCY
from mutransformer.planning.estimate import Estimate
from mutransformer.planning.show import TRUST
from mutransformer.planning.simulate import COSTINGS, Simulated, flops_by_convention
from mutransformer.planning.timing import HBM_EFFICIENCY


def of_case(found: Estimate) -> dict[str, Any]:
    """What is planned, and the constants that it rests on."""
    case, chip = found.case, found.case.topology.chip
    return {
        "name": case.config.name,
        "topology": str(case.topology),
        "chips": case.topology.size,
        "mesh": case.sizes,
        "remat": case.config.model.remat,
        "accumulate": case.config.optim.grad_accumulation_steps,
        "parameters": found.parameters,
        "tokens_per_step": case.config.tokens_per_step,
        "steps": case.config.steps,
        "chip": {
            "peak_flops": chip.peak_flops,
            "clock": chip.clock,
            "hbm_bytes": chip.hbm_bytes,
            "hbm_bandwidth": chip.hbm_bandwidth,
            "hbm_efficiency": HBM_EFFICIENCY,
            "ici_bandwidth_of_an_axis": chip.ici_bandwidth,
            "collective_latency": LATENCY,
        },
    }


def of_estimate(found: Estimate) -> dict[str, Any]:
    """The instant answer."""
    return {
        "memory": found.memory,
        "peak_bytes": found.peak,
        "fits": found.fits,
        "flops": found.flops,
        "hbm_bytes": found.hbm_bytes,
        "collectives": [
            {
                "kind": each.kind,
                "axes": list(each.axes),
                "of": each.purpose,
                "count": each.count,
                "bytes": each.bytes,
                "wire_bytes": each.wire,
                "seconds": each.seconds,
            }
            for each in found.traffic
        ],
        "bounds": found.bounds,
        "bound": found.bound,
        "step_seconds_at_least": found.seconds,
        "step_seconds_guess": found.guess,
        "mfu_at_most": found.mfu,
        "run_at_least": found.run(found.seconds),
        "unknown_kernels": found.unknown,
    }


def of_simulated(found: Simulated, estimate: Estimate) -> dict[str, Any]:
    """The compiled answer. mfu: by this project's convention; mfu_6n: with the embedding's parameters counted too."""
    conventions = flops_by_convention(estimate)
    costings = {}
    for costing in COSTINGS:
        t = found.totals[costing]
        costings[costing] = {
            "step_seconds": t.seconds,
            **{name: found.mfu(costing, flops) for name, flops in conventions.items()},
            "compute_seconds": t.compute,
            **{f"{kind}_seconds": t.by_kind[kind] for kind in ("matmul", "kernel", "other", "unestimated")},
            "communication_seconds": t.communication,
            "exposed_seconds": t.exposed,
            "memory_wait_seconds": t.by_kind["wait"],
            "collectives": [
                {
                    "kind": key.kind,
                    "axes": list(key.axes),
                    "group": key.n,
                    "async": key.is_async,
                    **dict(zip(("count", "bytes", "wire_bytes", "seconds", "exposed_seconds"), sums, strict=True)),
                }
                for key, sums in sorted(t.collectives.items(), key=lambda item: -item[1][3])
            ],
            "top": [{"kind": kind, "source": source, "seconds": s} for kind, source, s in t.costly(20)],
        }
    return {
        "compile_seconds": found.compiled.seconds,
        "memory": found.memory,
        "peak_bytes": found.peak,
        "fits": found.fits,
        "step_seconds": found.seconds,
        "model_flops": {name: flops * found.case.topology.size for name, flops in conventions.items()},
        "costings": costings,
        "run": estimate.run(found.seconds),
        "warnings": found.totals[COSTINGS[0]].warnings,
        "trust": TRUST,
    }
