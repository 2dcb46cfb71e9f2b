"""Scores of held-out text, and of the counting models beside them, against the plain formulas."""

import math

import numpy as np
import pytest
from tokens import mixture

from mutransformer.training.evaluate import loss_metrics, ngram_losses


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
