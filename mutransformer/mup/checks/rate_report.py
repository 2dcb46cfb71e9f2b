"""What a sweep of learning rates over widths shows, as verdicts and tables in plain text. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from mutransformer.mup.checks.runs import Run
from mutransformer.mup.checks.transfer import Variant, analyze
from mutransformer.mup.checks.transfer_verdicts import drift_in_words, judge
from mutransformer.mup.checks.verdict import Verdict, passed, require
from mutransformer.mup.text import aligned


@dataclass(frozen=True)
class TransferReport:
    """Whether the best learning rate stays where it is as the model grows, and whether wider is better.

    Attributes:
        variants: the numbers, controls last.
        verdicts: two for each variant that is not a control, one for each control, and warnings.
    """

    variants: tuple[Variant, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether something passes, and nothing fails or is unknown. Controls and warnings decide nothing."""
        return passed(self.verdicts)

    def __str__(self) -> str:
        """The verdicts, and for each variant its losses by width and rate, its optima and their drift."""
        return "\n\n".join(["\n".join(map(str, self.verdicts)), *map(_section, self.variants)])


def transfer_report(
    runs: Sequence[Run], max_drift: float = 0.5, controls: Sequence[str] = (), rate: float | None = None
) -> TransferReport:
    """Judges the runs of `mup.sweep`, of one variant or several.

    Args:
        runs: no two of the same variant, width, learning rate and seed.
        max_drift: of the optimum over all widths, in octaves.
        controls: names of variants that should not transfer; `sp`, and names that start with `sp `, always are.
        rate: log2 of the learning rate at which widths are compared step by step; None: the best one of the narrowest width.

    Raises:
        CheckError: there is nothing to judge, as `analyze` says, or max_drift is negative.
    """
    require(max_drift >= 0, f"max_drift {max_drift}: must be 0 or more, in octaves")
    variants = analyze(runs, controls, rate)
    return TransferReport(tuple(variants), tuple(judge(variants, runs, max_drift)))


def _section(variant: Variant) -> str:
    """Losses with each width's lowest marked *, optima as log2, and what tuning on the narrowest width costs."""
    rows = [["width", *(f"2^{rate:.4g}" for rate in variant.rates), "optimum, log2", "loss - lowest at the narrowest's best"]]
    for width, fit in variant.fits.items():
        losses = [f"{fit.cells[rate]}{'*' if rate == fit.best else ''}" if rate in fit.cells else "" for rate in variant.rates]
        penalty = fit.penalty(variant.tuned)
        rows.append([str(width), *losses, str(fit.optimum), "unknown" if penalty is None else f"{penalty:.4f}"])
    return "\n".join([variant.title, aligned(rows), drift_in_words(variant)])
