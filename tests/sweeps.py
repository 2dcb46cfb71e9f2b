"""Sweeps that were never run: losses from formulas, so that a report's every number is known beforehand."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mutransformer.study.sweep.records import Run

WIDTHS, SEEDS, RATES = (64, 128, 256, 512), (0, 1), tuple(range(-10, -2))
LOGGED = list(range(1, 201, 10))


def make_run(
    variant: str,
    width: int,
    rate: float,
    seed: int,
    loss: float,
    train: Sequence[float] | None = None,
    diverged_at: int | None = None,
    steps: int = 200,
) -> Run:
    """A run at log2(LR) = rate with this validation loss and, at the steps of LOGGED, these training losses."""
    lost = diverged_at is not None or math.isinf(loss)
    train = [8.0 - (8.0 - min(loss, 8.0)) * (1 - math.exp(-step / 40)) for step in LOGGED] if train is None else list(train)
    return Run(
        variant=variant,
        width=width,
        lr=2.0**rate,
        seed=seed,
        status="diverged" if lost else "finished",
        steps=steps,
        diverged_at=(LOGGED[3] if diverged_at is None else diverged_at) if lost else None,
        logged=LOGGED,
        train_loss=[
            None if lost and step >= (diverged_at or LOGGED[3]) else loss for step, loss in zip(LOGGED, train, strict=True)
        ],
        validation_loss=None if lost else loss,
        seconds=1.5,
        settings={"optim.rule": variant.split()[0], "data.seq_len": 128, "model.d_model": width},
    )


def sweep(
    variant: str = "mup",
    optimum: Callable[[int], float] = lambda width: -6.2,
    *,
    widths: Sequence[int] = WIDTHS,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    noise: float = 0.0,
    diverges_above: Callable[[int], float] = lambda width: math.inf,
) -> list[Run]:
    """Parabolas in log2(LR) around optimum(width), lower by 0.3 nats with each doubling of the width, plus a seed's noise."""
    runs = []
    for width in widths:
        for rate in rates:
            for seed in seeds:
                jitter = noise * float(np.random.default_rng([width, int(rate * 100) + 5000, seed]).normal())
                loss = 5.0 - 0.3 * math.log2(width / 64) + 0.04 * (rate - optimum(width)) ** 2 + jitter
                runs.append(make_run(variant, width, rate, seed, math.inf if rate > diverges_above(width) else loss))
    return runs
