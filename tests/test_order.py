"""The order law: batch k is the same whatever draws it; within an epoch of a source no row comes twice or is lost."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tokens import source, whole_row

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.pipeline import fingerprint, train_batches
from mutransformer.data.batches.rows import rows_of
from mutransformer.data.cache.dataset import TokenSplit
from mutransformer.errors import ConfigError

T, B, STEPS, N_VOCAB = 8, 8, 200, 10_000
WEIGHTS = {"code": 0.5, "books": 0.3, "web": 0.2}
NAMES = sorted(WEIGHTS)


def documents(n: int, first: int) -> list[list[int]]:
    """Of 3 to 20 tokens, no two alike: token // 20 is the document."""
    return [list(range(20 * (first + k), 20 * (first + k) + 3 + k % 18)) for k in range(n)]


def mixture(weights: dict[str, float] | None = None, drop: int = 0) -> TokenSplit:
    """Three sources in several shards: 90, 140 and 50 documents."""
    weights = weights or WEIGHTS
    sizes = {"books": (90, 0, 2), "code": (140 - drop, 200, 3), "web": (50, 400, 1)}
    tokens = [source(documents(n, first), n_shards, name) for name, (n, first, n_shards) in sizes.items() if name in weights]
    return TokenSplit("train", tuple(tokens), tuple(weights[t.source] for t in tokens))


def config(rows: str = "concat", **settings: Any) -> DataConfig:
    """rows: concat, pad, or apart for documents kept apart in rows of concat."""
    settings = ({"intra_document_mask": True} if rows == "apart" else {"packing": rows}) | settings
    return dataclasses.replace(DataConfig(seq_len=T, batch_size=B, prefetch=0), **settings)


def hashes(text: TokenSplit, c: DataConfig, n_process: int = 1, seed: int = 0, first: int = 0, steps: int = STEPS) -> list[str]:
    """Of each global batch, the processes' rows joined."""
    drawing = [train_batches(text, c, seed, n_process, (p,), N_VOCAB) for p in range(n_process)]
    found = []
    for batches in drawing:
        batches.set_state({"next_index": first})
    for _ in range(steps):
        parts = [next(batches) for batches in drawing]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True) if arrays[0] is not None]
        found.append(hashlib.sha256(b"".join(a.tobytes() for a in joined)).hexdigest())
    for batches in drawing:
        batches.close()
    return found


@pytest.mark.parametrize("rows", ["concat", "apart", "pad"])
def test_processes_and_threads_draw_the_same_batches(rows: str) -> None:
    text, n = mixture(), 60  # batches: more than an epoch of each source
    one = hashes(text, config(rows), steps=n)
    assert len(set(one)) == n, "batches repeat: nothing is shown"
    for n_process, settings in ((2, {}), (4, {}), (2, {"prefetch": 5, "threads": 4})):
        assert hashes(text, config(rows, **settings), n_process, steps=n) == one


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_worker_processes_draw_the_same_batches(workers: int) -> None:
    text = mixture()
    one = hashes(text, config("apart"), steps=60)
    assert hashes(text, config("apart", workers=workers, prefetch=2), steps=60) == one != hashes(text, config(), steps=60)


@pytest.mark.slow
def test_a_killed_worker_and_an_error_in_one_are_one_line() -> None:
    batches = train_batches(mixture(), config(workers=2, prefetch=2), 0, 1, (0,), N_VOCAB)
    next(batches)
    worker = next(p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline()))
    worker.kill()
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"data\.workers = 2: a process that reads ahead was killed"):
        for _ in range(1000):
            next(batches)
    batches.close()
    assert time.monotonic() - start < 10
    batches = train_batches(mixture(), config(workers=1), 0, 1, (0,), n_vocab=20)
    with pytest.raises(ConfigError, match=r"train token \d+: id \d+ is outside the vocabulary of 20"):
        for _ in range(20):
            next(batches)
    batches.close()


def test_the_law_can_fail() -> None:
    """Another seed, weight, source or document gives other batches; so does shuffling in each process, as is often done."""
    one = hashes(mixture(), config(), steps=20)
    assert hashes(mixture(), config(), seed=1, steps=20) != one
    assert hashes(mixture(drop=1), config(), steps=20) != one
    heavier = mixture(WEIGHTS | {"web": 0.4})
    assert hashes(heavier, config(), steps=20) != one
    prints = [fingerprint(text, config(), 0) for text in (mixture(), heavier, mixture(drop=1), mixture({"web": 1.0}))]
    assert len({json.dumps(p) for p in prints}) == 4 and fingerprint(mixture(), config(), 0) == prints[0]
    halves = [train_batches(mixture(), config(batch_size=B // 2), p, 1, (0,), N_VOCAB) for p in range(2)]
    local = [hashlib.sha256(np.concatenate([next(h).tokens for h in halves]).tobytes()).hexdigest() for _ in range(20)]
    assert local != one


def test_a_restart_with_other_processes_continues_the_sequence() -> None:
    text, rng = mixture(), random.Random(0)
    whole = hashes(text, config())
    at, found = 0, []
    while at < STEPS:
        n = min(rng.randint(1, 40), STEPS - at)
        found += hashes(text, config(prefetch=rng.choice([0, 3])), rng.choice([1, 2, 4, 8]), first=at, steps=n)
        at += n
    assert found == whole


@pytest.mark.parametrize("rows", ["concat", "pad"])
def test_an_epoch_has_each_row_of_a_source_once(rows: str) -> None:
    text = mixture()
    batches = train_batches(text, config(rows), 0, 1, (0,), N_VOCAB)
    drawn = [tuple(row) for batch in islice(batches, STEPS) for row in batch.tokens.tolist()]
    of: dict[tuple[int, ...], tuple[str, int]] = {}
    sizes = {}
    for tokens in text.sources:
        all_rows = rows_of(tokens, config(rows))
        sizes[tokens.source] = len(all_rows)
        of |= {tuple(whole_row(all_rows, i, T).tokens.tolist()): (tokens.source, i) for i in range(len(all_rows))}
    assert len(of) == sum(sizes.values()), "rows are not told apart: nothing is shown"
    for name, n in sizes.items():
        mine = [of[row][1] for row in drawn if of[row][0] == name]
        epochs = [mine[k : k + n] for k in range(0, len(mine), n)]
        assert len(epochs) >= 3
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(n)) and epoch != list(range(n))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


def test_sources_come_by_their_weights_at_every_point() -> None:
    text = mixture()
    starts = {"books": range(0, 200), "code": range(200, 400), "web": range(400, 500)}
    batches = train_batches(text, config("pad"), 0, 1, (0,), N_VOCAB)
    drawn = [row[0] // 20 for batch in islice(batches, 50) for row in batch.tokens.tolist()]
    for n in (10, 20, 100, len(drawn)):
        for name, weight in WEIGHTS.items():
            count = sum(k in starts[name] for k in drawn[:n])
            assert abs(count - weight * n) <= 1


def test_a_source_keeps_its_order_when_others_come_and_go() -> None:
    def order(names: list[str]) -> list[int]:
        batches = train_batches(mixture({name: WEIGHTS[name] for name in names}), config("pad"), 0, 1, (0,), N_VOCAB)
        ids = [row[0] // 20 for batch in islice(batches, 40) for row in batch.tokens.tolist()]
        return [k for k in ids if 200 <= k < 400][:50]

    assert order(["books", "code"]) == order(NAMES) != sorted(order(NAMES))


PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_order import STEPS, config, hashes, mixture
out = Path(sys.argv[2])
text = mixture()
while (done := len(out.read_text().split())) < STEPS:
    (one,) = hashes(text, config(prefetch=2), int(sys.argv[3]), first=done, steps=1)
    with out.open("a") as file:
        file.write(one + "\\n")
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_sequence_goes_on(tmp_path: Path) -> None:
    """Each process draws some batches and is killed; the next goes on from what was written, with another number of parts."""
    out, rng, kills = tmp_path / "hashes", random.Random(1), 0
    out.touch()
    while True:
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(out), str(rng.choice([1, 2, 4]))]
        process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        before = out.stat().st_size
        while process.poll() is None and out.stat().st_size == before:
            time.sleep(0.01)
        try:
            process.wait(timeout=rng.uniform(0.02, 0.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            break
    assert process.returncode == 0 and kills >= 3
    assert out.read_text().split() == hashes(mixture(), config())
