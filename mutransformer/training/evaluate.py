"""Evaluation: one pass over held-out rows, and the losses of unigram and bigram counts of the same tokens for comparison."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Integer

from mutransformer.data.batches import pipeline
from mutransformer.data.batches.rows import Batch
from mutransformer.data.cache.dataset import Corpus, TokenSplit
from mutransformer.data.cache.prepare import prepare_files
from mutransformer.model.weights import Transformer
from mutransformer.sharding.mesh import data_share, put_batch
from mutransformer.sharding.processes import all_processes
from mutransformer.sharding.stopping import Stopped
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.program import Program
from mutransformer.training.step import make_position_sums
from mutransformer.training.url_folder import readable

AHEAD = 4  # batches in flight: enough to keep the device busy, few enough to hold in memory
COUNTED = 1 << 26  # tokens of a split in which n-grams are counted, at most: a gigabyte of memory


Report = Callable[[str, int, int], None]  # of progress: the name of a text, its targets that are scored, and its tokens


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
    sums = [(float(nats), int(count)) for nats, count in _read(eval_step, params, batches, mesh, stop)]
    targets = sum(count for _, count in sums)
    return Scored(loss_metrics(math.fsum(nats for nats, _ in sums) / targets, split), targets)


def _read(
    step: Callable[..., tuple[Array, Array]],
    params: Transformer[Array],
    batches: Iterable[Batch],
    mesh: Mesh,
    stop: Callable[[], bool],
) -> Iterator[tuple[Array, Array]]:
    """What a step gives of each batch, in order, read AHEAD batches later than it is asked for."""
    in_flight = deque[tuple[Array, Array]]()
    for batch in batches:
        if stop():
            raise Stopped
        in_flight.append(step(params, put_batch(batch, mesh)))
        if len(in_flight) > AHEAD:
            yield in_flight.popleft()
    yield from in_flight


def loss_metrics(loss: float, split: TokenSplit) -> dict[str, float]:
    """Loss in nats per token, its perplexity, and bits per byte of the split's text."""
    bits = loss / math.log(2) * split.n_tokens / max(1, split.n_bytes)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}


def evaluate_run(program: Program, corpus: Corpus, report: Report = lambda name, scored, tokens: None) -> dict[str, Any]:
    """Evaluates a run's checkpoint on a full split and on the texts of eval.sets, as eval.split and eval.checkpoint say.

    All tokens count, except those that packing=pad cuts off. Of each text: loss, perplexity and bits per byte, and the loss by
    position (see by_position). Raises ConfigError if the run, its checkpoint or a text is missing or does not fit the config.
    """
    config, n_vocab, mesh = program.config, program.vocabulary.n_vocab, program.mesh
    train, held_out = corpus.splits["train"], corpus.splits[config.eval.split]
    sets = {
        name: prepare_files(config.data, name, files, corpus.tokenizer, all_processes())
        for name, files in config.eval.sets.items()
    }
    with readable(config) as folder, closing(Checkpoints(config, folder, read_only=True)) as checkpoints:
        step = checkpoints.chosen(program.state)
        checkpoints.check_same(step, pipeline.fingerprint(train, config.data, config.seed))
        state, _ = checkpoints.restore(step, program.state)
    position_sums = make_position_sums(program)

    def score(name: str, text: TokenSplit) -> dict[str, Any]:
        batches = pipeline.eval_batches(text, config.data, None, *data_share(mesh), n_vocab)
        sums, targets = list[np.ndarray](), np.zeros(config.data.seq_len, np.int64)
        report(name, 0, text.n_tokens)
        for nats, count in _read(position_sums, state.params, batches, mesh, stop=lambda: False):
            sums.append(np.asarray(nats, np.float64))
            targets += np.asarray(count)
            report(name, int(targets.sum()), text.n_tokens)
        nats, scored = np.sum(sums, axis=0), int(targets.sum())
        counts = {"tokens": text.n_tokens, "scored": scored, "bytes": text.n_bytes}
        return counts | {"model": loss_metrics(float(nats.sum()) / scored, text), "by_position": by_position(nats, targets)}

    found = score(config.eval.split, held_out)
    ngrams = {}
    if found["scored"] == held_out.n_tokens:  # with packing=pad the n-grams would also predict what is cut off
        ngrams = ngram_losses(train.first(COUNTED), held_out.first(COUNTED), n_vocab)
    return {
        "run": folder.name,
        "step": step,
        "split": config.eval.split,
        **found,
        **{name: loss_metrics(loss, held_out) for name, loss in ngrams.items()},
        "sets": {name: score(name, text) for name, text in sets.items()},
    }


def by_position(nats: Float[np.ndarray, " T"], targets: Int[np.ndarray, " T"]) -> list[dict[str, Any]]:
    """The mean loss at positions 0, 1, 2-3, 4-7, ... of a row, from sums of losses and numbers of targets at each position.

    Position t has read t tokens of its row or, with data.intra_document_mask, of its document. first, last: the positions.
    """
    found, first = list[dict[str, Any]](), 0
    while first < len(nats):
        stop = min(2 * first or 1, len(nats))
        n = int(targets[first:stop].sum())
        if n:
            found.append({"first": first, "last": stop - 1, "targets": n, "loss": float(nats[first:stop].sum()) / n})
        first = stop
    return found


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
