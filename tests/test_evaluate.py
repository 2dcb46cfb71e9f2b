"""Scores of held-out text, and of the counting models beside them, against the plain formulas."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_sharding import params
from tokens import mixture

from mutransformer.commands.evaluate import tables
from mutransformer.config.load import load
from mutransformer.data.batches.rows import Batch
from mutransformer.data.cache.prepare import prepare_files
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer
from mutransformer.errors import ConfigError
from mutransformer.sharding.mesh import put_batch
from mutransformer.training.evaluate import by_position, loss_metrics, ngram_losses
from mutransformer.training.program import Vocabulary, build
from mutransformer.training.step import make_eval_step, make_logits, make_position_sums


def test_unigram_and_bigram_against_loops() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 7, 500).astype(np.uint16)
    held = rng.integers(0, 8, 60).astype(np.uint16)  # 7 was never seen
    got = ngram_losses(train, held, 8)

    one = [(np.sum(train == t) + 1) / (len(train) + 8) for t in range(8)]
    assert got["unigram"] == pytest.approx(np.mean([-math.log(one[t]) for t in held]))

    def bigram(prior: float) -> float:
        nats = -math.log(one[held[0]])
        for a, b in zip(held[:-1], held[1:], strict=True):
            seen = np.sum((train[:-1] == a) & (train[1:] == b))
            nats -= math.log((seen + prior * one[b]) / (np.sum(train[:-1] == a) + prior))
        return nats / len(held)

    assert got["bigram"] == pytest.approx(min(bigram(prior) for prior in (1, 10, 100, 1000)))


def test_a_bigram_finds_what_a_unigram_cannot() -> None:
    cycle = np.tile(np.arange(4, dtype=np.uint16), 100)
    got = ngram_losses(cycle, cycle, 4)
    assert got["unigram"] == pytest.approx(math.log(4)) and got["bigram"] < 0.05


def test_bits_per_byte() -> None:
    file = mixture([[0] * 100], n_bytes=400)
    assert loss_metrics(math.log(2), file) == pytest.approx({"loss": math.log(2), "perplexity": 2.0, "bits_per_byte": 0.25})


# By position


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
def test_positions_in_powers_of_two(n: int) -> None:
    nats, targets = np.arange(1.0, n + 1), np.full(n, 2)
    found = by_position(nats, targets)
    assert [one["first"] for one in found] == [first for first in (0, 1, 2, 4, 8) if first < n]
    assert [i for one in found for i in range(one["first"], one["last"] + 1)] == list(range(n)), "each position once"
    for one in found:
        assert one["loss"] == pytest.approx(nats[one["first"] : one["last"] + 1].mean() / 2)


def test_a_position_without_targets_is_left_out() -> None:
    assert [one["first"] for one in by_position(np.array([1.0, 0, 3, 4]), np.array([1, 0, 1, 0]))] == [0, 2]


T = 12
SMALL = [
    "model.d_model=32",
    "model.d_base=16",
    "model.d_head=8",
    "model.n_layer=2",
    "model.ff_multiple=2",
    "model.head_chunk=10",
    "model.n_vocab=90",
    "model.vocab_multiple=32",
    "precision.compute=float32",
    f"data.seq_len={T}",
    "data.batch_size=8",
]


@pytest.mark.parametrize(("x", "y", "apart"), [(1, 1, False), (4, 2, True)])
def test_losses_by_position_are_those_of_the_logits(x: int, y: int, apart: bool) -> None:
    """And together they are the loss of an evaluation."""
    config = load([*SMALL, f"mesh.x={x}", f"mesh.y={y}", f"data.intra_document_mask={str(apart).lower()}"])
    made = build(config, jax.devices()[: x * y], Vocabulary(90, 3, 4))
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 90, (8, T), dtype=np.int32), rng.random((8, T)) < 0.8
    segments = np.sort(rng.integers(0, 3, (8, T), dtype=np.int32), axis=1) if apart else None
    batch, weights = put_batch(Batch(tokens, mask, segments), made.mesh), params(made.config)
    nats, targets = (np.asarray(a) for a in make_position_sums(made)(weights, batch))

    logits = np.asarray(make_logits(made)(weights, batch.tokens, batch.segments), np.float64)[:, :, :90]
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, :, None], -1)[:, :, 0]
    expected, counts = np.zeros(T), np.zeros(T, int)
    for row in range(8):
        for t in range(T):
            at = t if segments is None else t - int(np.argmax(segments[row] == segments[row, t]))
            expected[at] += losses[row, t] * mask[row, t]
            counts[at] += mask[row, t]
    assert np.array_equal(targets, counts) and nats == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert nats[:-1] != pytest.approx(expected[1:], rel=1e-2), "the control: a position further on"
    total, count = make_eval_step(made)(weights, batch)
    assert float(total) == pytest.approx(nats.sum(), rel=1e-6) and int(count) == targets.sum()


# What is printed


def test_the_tables() -> None:
    scores = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 0.5}
    span = {"first": 0, "last": 0, "targets": 9, "loss": 2.0}
    found = {"tokens": 1000, "scored": 990, "bytes": 3000, "model": scores, "by_position": [span]}
    more = found | {"scored": 1000, "by_position": [span, {"first": 2, "last": 3, "targets": 9, "loss": 0.25}]}
    shown = tables({"run": "runs/x", "step": 7, "split": "test", "bigram": scores, **found, "sets": {"notes": more}})
    assert (
        shown
        == """\
runs/x, step 7

                  tokens bytes/token     loss  perplexity bits/byte
test                 990        3.00   1.0000      2.7183    0.5000
  bigram                               1.0000      2.7183    0.5000
  10 tokens are truncated and do not count
notes              1,000        3.00   1.0000      2.7183    0.5000

loss by position in a row (tokens read before)

                 test    notes
0              2.0000   2.0000
2-3                     0.2500"""
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval.sets.a b.files=[a]"], "eval.sets.a b: a text's name must consist of letters, digits, _ and -"),
        (["eval.sets.test.files=[a]"], "eval.sets.test: the name of a split of the data; choose another"),
        (["eval.sets.notes.column=body"], "eval.sets.notes.files is empty: name at least one file or glob"),
        (["eval.sets.notes.source=hub"], "must be text or jsonl or parquet or arrow"),
        (["eval.sets.notes.file=a"], "did you mean eval.sets.NAME.files"),
    ],
)
def test_mistakes_in_the_texts(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(args)


def test_a_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = load([f"data.cache_dir={tmp_path}/cache", f"eval.sets.notes.files=[{tmp_path}/none.txt]"])
    with pytest.raises(ConfigError, match=r"eval\.sets\.notes\.files.*none\.txt"):
        prepare_files(config.data, "notes", config.eval.sets["notes"], ByteTokenizer())
