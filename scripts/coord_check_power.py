"""Measure how good the coordinate check is: which deliberate mistakes it sees, and how often it fails a correct model.

Examples:
    python scripts/coord_check_power.py mistakes --out results/coordinates/mistakes.md
    python scripts/coord_check_power.py false-alarms --checks 200 --out results/coordinates/false_alarms.json

The first makes one mistake at a time in the rules of muP, or in the settings, and runs the check; the correct variants beside
them must pass. The second trains many seeds, and judges each three of them as a check of its own.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.errors import FAILED, FINISHED
from mutransformer.mup.checks.slopes import MAX_SLOPE, Coordinate, Deviation, Expected, deviations, fit_slopes, judge
from mutransformer.mup.rules import ONE, RULES, Powers, Role, Row

SETTINGS = ["study", "precision.compute=float32", "optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=0.00390625"]
MATRICES = ("hidden", "residual")


@dataclass(frozen=True)
class Case:
    """A variant of the model. What is wrong with it, or with nothing wrong, what it is."""

    name: str
    settings: Sequence[str] = ()
    rows: Callable[[dict[Role, Row]], dict[Role, Row]] | None = None  # the rule's rows -> those to put in their place
    at_width: Callable[[int], tuple[str, ...]] = lambda width: ()  # further settings by width

    def config(self, width: int, further: Sequence[str]) -> Config:
        return load([*SETTINGS, *further, *self.settings, f"model.d_model={width}", *self.at_width(width)])

    @contextmanager
    def patched(self) -> Iterator[None]:
        rule = load([*SETTINGS, *self.settings]).optim.rule
        before = RULES[rule]
        if self.rows is not None:
            RULES[rule] = replace(before, rows={**before.rows, **self.rows(dict(before.rows))})
        try:
            yield
        finally:
            RULES[rule] = before


def rows(roles: Sequence[Role], **changes: Powers) -> Callable[[dict[Role, Row]], dict[Role, Row]]:
    """Those roles with another std, multiplier or lr."""
    return lambda old: {role: old[role]._replace(**changes) for role in roles}


GAINS, DECAY = "model.norm_scale=vector", "optim.weight_decay=0.1"
FACTORS = (("embed", 3), ("residual", 0.5), ("logits", 2))
AT_BASE = Powers(fan_in=-0.5, width=0.5)  # fan-in^-1/2 of the base model
MISTAKES = [
    Case("the embedding starts with a std of M^-1/2", rows=rows(["input"], std=Powers(width=-0.5))),
    Case("hidden matrices start with a std that does not fall", rows=rows(["hidden"], std=AT_BASE)),
    Case("residual projections start with a std that does not fall", rows=rows(["residual"], std=AT_BASE)),
    Case("the unembedding starts with a std that does not fall", rows=rows(["output"], std=Powers(fan_in=-1.0, width=1.0))),
    Case("the embedding's rate falls as 1 / M", ("optim.embed_lr_exponent=-1",)),
    Case("the embedding's rate falls as M^-1/2", ("optim.embed_lr_exponent=-0.5",)),
    Case("hidden matrices learn at the base rate", rows=rows(["hidden"], lr=ONE)),
    Case("residual projections learn at the base rate", rows=rows(["residual"], lr=ONE)),
    Case("the unembedding learns at the base rate", rows=rows(["output"], lr=ONE)),
    Case("gains learn at a rate that falls as 1 / M", (GAINS,), rows(["gain", "outer_gain"], lr=Powers(width=-1.0))),
    Case("the rate of matrices is divided by fan-in x fan-out", rows=rows(MATRICES, lr=Powers(width=-2.0))),
    Case("the output multiplier is forgotten", ("optim.rule=mup_table8",), rows(["output"], multiplier=ONE)),
    Case("the base width follows the width", at_width=lambda width: (f"model.d_base={width}",)),
    Case("the optimizer is plain AdamW", rows=rows(["hidden", "residual", "output"], lr=ONE)),
    Case("attention is divided by the width", at_width=lambda width: (f"model.qk_scale={1 / width}",)),
    Case("eps is far too large", ("optim.eps=0.001",)),
    Case("decay is coupled to rates that fall", (DECAY, "optim.decay=coupled")),
    Case("gains decay", (GAINS, DECAY, "optim.decay_vectors=true")),
]
CORRECT = [
    Case("mup"),
    Case("without the factor on the output's rate", ("optim.lr_factors.output=1",)),
    *(Case(f"unembed_init={start}", (f"model.unembed_init={start}",)) for start in ("base", "sp", "zero")),
    Case("q_init=zero, residual_init=zero", ("model.q_init=zero", "model.residual_init=zero")),
    *(Case(rule, (f"optim.rule={rule}",)) for rule in ("abs_mup", "mup_table8", "completep", "completed_p")),
    Case("Lion", ("optim.name=lion",)),
    Case("Muon", ("optim.name=muon",)),
    Case("gains, biases, independent decay", (GAINS, "model.biases=true", DECAY)),
    Case("squared ReLU, normed queries and keys", ("model.activation=sqrelu", "model.qk_norm=true")),
    Case("heads twice as wide as the model", ("model.attention_multiple=2",)),
    Case("embed x 3, residual x 0.5, logits x 2", [f"model.{part}_multiplier={by}" for part, by in FACTORS]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mistakes", "false-alarms"])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the model and the data")
    parser.add_argument("--widths", default="64,128,256", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each check (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="updates (default: %(default)s)")
    parser.add_argument("--checks", type=int, default=200, help="false-alarms: how many (default: %(default)s)")
    parser.add_argument("--only", help="mistakes: those whose names contain this")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    args.widths = [int(width) for width in args.widths.split(",")]
    logging.basicConfig(level=logging.WARNING)
    from mutransformer.sharding import processes

    processes.simulate_devices(2)
    return mistakes(args) if args.what == "mistakes" else false_alarms(args)


def measured(case: Case, args: argparse.Namespace, seeds: Sequence[int]) -> tuple[list[Coordinate], Expected]:
    """The coordinates of a case at all widths, and the slopes expected of it."""
    from mutransformer.study.coordinates import expected_slopes, measure
    from mutransformer.study.sweep.grid import VariantConfig
    from mutransformer.training.program import prepare_data

    found: list[Coordinate] = []
    expected: Expected | None = None
    with case.patched():
        for width in args.widths:
            config = case.config(width, args.settings)
            coordinates, specs = measure(VariantConfig("mup", config), width, seeds, args.steps, prepare_data(config))
            found += coordinates
            expected = expected or expected_slopes(config, specs)
    assert expected is not None
    return found, expected


def mistakes(args: argparse.Namespace) -> int:
    lines = ["| | verdict | furthest from expected | also |", "|---|---|---|---|"]
    wrong = 0
    for cases, should_pass in ((MISTAKES, False), (CORRECT, True)):
        lines.append(f"| **{'correct' if should_pass else 'mistakes'}** | | | |")
        for case in cases:
            if args.only and args.only not in case.name:
                continue
            found, expected = measured(case, args, range(args.seeds))
            fits = fit_slopes(found)
            verdicts = [v for v in judge(fits, expected, "mup", None, "width") if not v.text.startswith("no control")]
            alarm = any(verdict.outcome in ("FAIL", "WARNING") for verdict in verdicts)
            wrong += alarm == should_pass
            outcome = ", ".join(verdict.outcome for verdict in verdicts)
            lines.append(f"| {case.name} | {outcome} | {' | '.join(_worst(deviations(fits, expected)))} |")
            print(lines[-1], flush=True)
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{wrong} wrong answers")
    return FAILED if wrong else FINISHED


def _worst(found: Sequence[Deviation]) -> tuple[str, str]:
    """The furthest slope, and the other names whose slopes are outside."""
    names = list(dict.fromkeys(f"{d.fit.kind} of {d.fit.name}" for d in found if d.excess > MAX_SLOPE))
    return str(found[0]), ", ".join(names[1:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def false_alarms(args: argparse.Namespace) -> int:
    """Each seed is in one check, so that the checks are independent."""
    found, expected = measured(CORRECT[0], args, range(args.checks * args.seeds))
    by_check: dict[int, list[Coordinate]] = {}
    for c in found:
        by_check.setdefault(c.seed // args.seeds, []).append(c)
    furthest = []
    for coordinates in by_check.values():
        worst = deviations(fit_slopes(coordinates), expected)[0]
        furthest.append({"excess": round(worst.excess, 4), "what": str(worst)})
    furthest.sort(key=lambda each: -each["excess"])
    failed = sum(each["excess"] > MAX_SLOPE for each in furthest)
    result = {
        "checks": len(furthest),
        "failed": failed,
        "limit": MAX_SLOPE,
        "widths": args.widths,
        "seeds": args.seeds,
        "steps": args.steps,
        "settings": args.settings,
        "furthest": furthest[:10],
        "median_excess": furthest[len(furthest) // 2]["excess"],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{failed} of {len(furthest)} checks of a correct model failed; the furthest: {furthest[0]['what']}")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
