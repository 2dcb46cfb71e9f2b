"""Evaluation: one pass over held-out rows, and the losses of unigram and bigram counts of the same tokens for comparison."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Integer

from mutransformer.data.batches import pipeline
from mutransformer.data.batches.rows import Batch
from mutransformer.data.cache.dataset import Corpus, TokenSplit
from mutransformer.model.weights import Transformer
from mutransformer.sharding.mesh import data_share, put_batch
from mutransformer.sharding.stopping import Stopped
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.program import Program
from mutransformer.training.step import make_eval_step
from mutransformer.training.url_folder import readable

AHEAD = 4  # batches in flight: enough to keep the device busy, few enough to hold in memory
COUNTED = 1 << 26  # tokens of a split in which n-grams are counted, at most: a gigabyte of memory


class Scored(NamedTuple):
    results: dict[str, float]  # as of loss_metrics
    targets: int  # the number of targets that counted


def evaluate(
    eval_step: Callable[[Transformer[Array], Batch], tuple[Array, Array]],
    params: Transformer[Array],
    batches: Iterable[Batch],
    mesh: Mesh,
    split: TokenSplit,
    stop: Callable[[], bool] = lambda: False,
) -> Scored:
    """The mean loss over the targets of the batches, of which each process passes its own rows. split: for its bytes per token.

    Raises Stopped if stop(), polled before each batch, is true.
    """
    sums, in_flight = list[tuple[float, int]](), deque[tuple[Array, Array]]()

    def read() -> None:
        nats, count = in_flight.popleft()
        sums.append((float(nats), int(count)))

    for batch in batches:
        if stop():
            raise Stopped
        in_flight.append(eval_step(params, put_batch(batch, mesh)))
        if len(in_flight) > AHEAD:
            read()
    while in_flight:
        read()
    targets = sum(count for _, count in sums)
    return Scored(loss_metrics(math.fsum(nats for nats, _ in sums) / targets, split), targets)


def loss_metrics(loss: float, split: TokenSplit) -> dict[str, float]:
    """Loss in nats per token, its perplexity, and bits per byte of the split's text."""
    bits = loss / math.log(2) * split.n_tokens / max(1, split.n_bytes)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}


def evaluate_run(program: Program, corpus: Corpus) -> dict[str, Any]:
    """Evaluates a run's checkpoint on a full split, as eval.split and eval.checkpoint say.

    All tokens of the split count, except those that packing=pad cuts off. Raises ConfigError if the run or its checkpoint is
    missing or does not fit the config.
    """
    config, n_vocab, mesh = program.config, program.vocabulary.n_vocab, program.mesh
    train, held_out = corpus.splits["train"], corpus.splits[config.eval.split]
    with readable(config) as folder, closing(Checkpoints(config, folder, read_only=True)) as checkpoints:
        step = checkpoints.chosen(program.state)
        checkpoints.check_same(step, pipeline.fingerprint(train, config.data, config.seed))
        state, _ = checkpoints.restore(step, program.state)
    batches = pipeline.eval_batches(held_out, config.data, None, *data_share(mesh), n_vocab)
    model, targets = evaluate(make_eval_step(program), state.params, batches, mesh, held_out)
    ngrams = {}
    if targets == held_out.n_tokens:  # with packing=pad the n-grams would also predict what is cut off
        ngrams = ngram_losses(train.first(COUNTED), held_out.first(COUNTED), n_vocab)
    return {
        "run": folder.name,
        "step": step,
        "split": config.eval.split,
        "tokens": held_out.n_tokens,
        "scored": targets,
        "bytes": held_out.n_bytes,
        "model": model,
        **{name: loss_metrics(loss, held_out) for name, loss in ngrams.items()},
    }


def ngram_losses(train: Integer[np.ndarray, " n"], held_out: Integer[np.ndarray, " m"], n_vocab: int) -> dict[str, float]:
    """Nats per held-out token of a unigram and a bigram model of the training tokens.

    The unigram model adds one to each count. The bigram model is smoothed towards the unigram with a Dirichlet prior (MacKay and
    Peto, 1995); its weight is chosen from a small grid on the held-out tokens themselves, which favors the bigram.
    """
    unigram = (np.bincount(train, minlength=n_vocab) + 1.0) / (len(train) + n_vocab)
    before, after = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    pairs, counts = np.unique(train[:-1].astype(np.int64) * n_vocab + train[1:], return_counts=True)
    at = np.minimum(np.searchsorted(pairs, before * n_vocab + after), len(pairs) - 1)
    seen = np.where(pairs[at] == before * n_vocab + after, counts[at], 0)
    total = np.bincount(train[:-1], minlength=n_vocab)[before]
    first = -math.log(unigram[held_out[0]])
    bigram = min(
        (first - np.log((seen + prior * unigram[after]) / (total + prior)).sum()) / len(held_out)
        for prior in (1.0, 10.0, 100.0, 1000.0)
    )
    return {"unigram": float(-np.log(unigram[held_out]).mean()), "bigram": float(bigram)}
