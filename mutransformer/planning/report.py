"""Plans and rankings: shown as tables, and as plain data for --json."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType

from mutransformer.planning.compiled.cost_model import LATENCY
from mutransformer.planning.compiled.replay import COMPUTE
from mutransformer.planning.compiled.simulate import Overlap, Simulated, Totals, model_flops
from mutransformer.planning.estimate.bounds import Estimate
from mutransformer.planning.remedies import Remedy
from mutransformer.planning.tables import bytes_, estimate_tables, format_seconds, simulated_tables, table_of, untimed_note
from mutransformer.planning.topology import HBM_EFFICIENCY

GUESS_NOTE = (
    "guess: lower bounds with typical losses, only for comparing settings. MFU: of the compiled step, otherwise of the guess."
)


class _Shown:
    """str() gives the tables that a rich console shows, in 100 columns."""

    def __str__(self) -> str:
        console = Console(width=100, highlight=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass(frozen=True)
class Plan(_Shown):
    """What a step costs."""

    estimate: Estimate  # lower bounds, by arithmetic
    by_remat: dict[str, Estimate]  # the same under each value of model.remat; not for an entry of a ranking
    simulated: Simulated | None = None  # the simulated schedule of the real compiler; None if it was not compiled
    remedies: list[Remedy] = field(default_factory=list)  # settings with which a step that does not fit would

    @property
    def fits(self) -> bool:
        """Whether the step fits into memory: by the compiler, where it was compiled."""
        return self.simulated.fits if self.simulated else self.estimate.fits

    @property
    def is_timed(self) -> bool:
        """Whether there are times to state: of a step that fits, on devices whose speed is known."""
        return self.fits and bool(self.estimate.bounds)

    def __rich__(self) -> Group:
        shown: list[RenderableType] = [estimate_tables(self.estimate, self.by_remat, self.is_timed)]
        if self.simulated:
            shown += ["", simulated_tables(self.simulated, self.estimate)]
        if not self.is_timed:
            shown.append(untimed_note(self.fits, self.estimate, self.remedies))
        return Group(*shown)

    def as_json(self) -> dict[str, Any]:
        """Plain data: bytes, seconds and FLOPs of one chip and one step unless the key says otherwise, and the constants used.

        Of a step that does not fit, and of one on devices whose speed is not known, there is no key for seconds or MFU.
        """
        scenario, c, e = self.estimate.scenario, self.estimate.scenario.config, self.estimate.scenario.program.execution
        memory_by_remat = {"by_remat": {policy: each.memory for policy, each in self.by_remat.items()}} if self.by_remat else {}
        return {
            "name": c.name,
            "topology": str(scenario.topology),
            "chips": scenario.topology.size,
            "mesh": scenario.mesh_sizes,
            "remat": c.model.remat,
            "grad_accumulation_steps": e.microbatches,
            "execution": {
                **_pick(e, "attention", "head_chunk", "overlap_groups", "via_all_to_all"),
                "xla_options": dict(e.compiler_options),
            },
            "parameters": self.estimate.parameters,
            **_pick(c, "tokens_per_step", "steps"),
            "device_kind": scenario.topology.chip.device_kind,
            "chip": scenario.topology.figures() | {"hbm_efficiency": HBM_EFFICIENCY, "collective_latency": LATENCY},
            "estimate": _estimate_json(self.estimate, self.is_timed) | memory_by_remat,
            **({"compiled": _simulated_json(self.simulated, self.estimate)} if self.simulated else {}),
            **({"would_fit": [each._asdict() for each in self.remedies]} if not self.fits else {}),
        }


@dataclass(frozen=True)
class Ranking(_Shown):
    """Settings that fit, fastest first."""

    plans: list[Plan]

    def __rich__(self) -> Group:
        """A table: those that were compiled first, by their simulated time."""
        timed = any(each.is_timed for each in self.plans)
        times = ("<bound", "at least", "guess", "MFU", "compiled", "memory") if timed else ("FLOPs",)
        order = "fastest first" if timed else "least work first"
        table = table_of(f"settings that fit, {order}", "<settings", "memory", *times)
        for each in sorted(self.plans, key=lambda each: each.simulated.seconds if each.simulated else math.inf):
            estimate = each.estimate
            settings = " ".join(setting.partition(".")[2] for setting in estimate.scenario.settings.split())
            table.add_row(settings, bytes_(estimate.peak_bytes), *(_times(each) if timed else [_work(estimate)]))
        compiled = next((each.simulated for each in self.plans if each.simulated), None)
        return Group(table, *([GUESS_NOTE] if timed else []), *([compiled.accuracy] if compiled else []))

    def as_json(self) -> list[dict[str, Any]]:
        return [each.as_json() for each in self.plans]


def _times(plan: Plan) -> list[str]:
    estimate, simulated = plan.estimate, plan.simulated
    if simulated and not simulated.fits:
        return [estimate.bound, "", "", "", "does not fit", bytes_(simulated.peak_bytes)]
    mfu = estimate.mfu(simulated.seconds if simulated else estimate.guess)
    compiled = [format_seconds(simulated.seconds), bytes_(simulated.peak_bytes)] if simulated else ["", ""]
    return [estimate.bound, format_seconds(estimate.seconds), format_seconds(estimate.guess), f"{mfu:.1%}", *compiled]


def _work(estimate: Estimate) -> str:
    return f"{(estimate.flops['matmul'] + estimate.flops['kernel']) / estimate.flops['model']:.2f} x model"


def _estimate_json(estimate: Estimate, is_timed: bool) -> dict[str, Any]:
    keys = ("kind", "axes", "count", "bytes", "wire_bytes", *(["seconds"] if is_timed else []))
    found = {
        **_pick(estimate, "memory", "peak_bytes", "fits", "flops", "hbm_bytes", "unknown_kernels"),
        "collectives": [{"of": each.purpose, **_pick(each, *keys)} for each in estimate.traffic],
    }
    if not is_timed:
        return found
    return found | {
        **_pick(estimate, "bounds", "bound"),
        "step_seconds_at_least": estimate.seconds,
        "step_seconds_guess": estimate.guess,
        "mfu_at_most": estimate.mfu(estimate.seconds),
        "run_at_least": estimate.run(estimate.seconds),
    }


def _simulated_json(simulated: Simulated, estimate: Estimate) -> dict[str, Any]:
    n_chips = simulated.scenario.topology.size
    memory = {"compile_seconds": simulated.compile_seconds, **_pick(simulated, "memory", "peak_bytes", "fits")}
    if not simulated.fits:
        return memory
    return memory | {
        "step_seconds": simulated.seconds,
        "model_flops": {name: each * n_chips for name, each in model_flops(simulated.scenario).items()},
        "costings": {each: simulated.mfu(each) | _totals_json(simulated.totals[each]) for each in simulated.totals},
        "run": estimate.run(simulated.seconds),
        "overlap": [_overlap_json(each) for each in simulated.overlaps],
        "warnings": simulated.totals[simulated.quoted].warnings,
        "trust": simulated.accuracy,
    }


def _overlap_json(each: Overlap) -> dict[str, Any]:
    return {
        **_pick(each, "where", "times", "exposed_seconds", "beside", "beside_seconds"),
        **_pick(each.collective, "kind", "axes", "bytes", "seconds", "source"),
    }


def _totals_json(t: Totals) -> dict[str, Any]:
    return {
        "step_seconds": t.seconds,
        **_pick(t, "compute_seconds", "communication_seconds", "exposed_seconds"),
        **{f"{kind}_seconds": t.by_kind[kind] for kind in COMPUTE},
        "memory_wait_seconds": t.by_kind["wait"],
        "collectives": [
            {"kind": key.kind, "axes": key.axes, "group": key.n, "async": key.is_async, **dataclasses.asdict(sums)}
            for key, sums in t.collectives.items()
        ],
        "top": [{"kind": kind, "source": source, "seconds": s} for (kind, source), s in list(t.costliest.items())[:20]],
    }


def _pick(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
