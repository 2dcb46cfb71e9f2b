"""One pass over held-out rows, and what a model must beat there: unigram and bigram counts of the same tokens."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Integer

from mutransformer.config.schema import Config
from mutransformer.data.batches import pipeline
from mutransformer.data.batches.pipeline import Batch
from mutransformer.data.cache.prepare import Mixture, prepare
from mutransformer.model.transformer import Transformer
from mutransformer.sharding.mesh import check_fits, data_share, make_mesh, put
from mutransformer.sharding.processes import agreed
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.state import plan
from mutransformer.training.step import make_eval_step

EvalStep = Callable[[Transformer[Array], Batch], tuple[Array, Array]]


AHEAD = 4  # batches that may wait for the device: enough to keep it busy, few enough to hold in memory


COUNTED = 1 << 26  # tokens of a split that unigrams and bigrams are counted in, at most: a gigabyte of memory


class Interrupted(Exception):
    """The run was asked to stop within an evaluation: what was summed so far is no result."""


class Scored(NamedTuple):
    results: dict[str, float]  # of `results`
    targets: int  # that counted


def evaluate(
    eval_step: EvalStep,
    params: Transformer[Array],
    batches: Iterable[Batch],
    mesh: Mesh,
    tokens: Mixture,
    stop: Callable[[], bool] = lambda: False,
) -> Scored:
    """The mean loss over the batches' targets.

    Args:
        eval_step: of `step.make_eval_step`.
        params: the weights.
        batches: this process's rows of each batch.
        mesh: of the weights.
        tokens: the split, for its bytes a token.
        stop: asked between batches.

    Raises:
        Interrupted: stop() was true.
    """
    nats, counts, ahead = list[float](), list[int](), deque[tuple[Array, Array]]()

    def read() -> None:
        total, count = ahead.popleft()
        nats.append(float(total))
        counts.append(int(count))

    for batch in batches:
        if stop():
            raise Interrupted
        ahead.append(eval_step(params, put(batch, mesh)))
        if len(ahead) > AHEAD:
            read()
    while ahead:
        read()
    return Scored(results(math.fsum(nats) / sum(counts), tokens), sum(counts))


def results(loss: float, tokens: Mixture) -> dict[str, float]:
    """Loss in nats a token, its perplexity, and bits per byte of the split's text."""
    bits = loss / math.log(2) * tokens.n_tokens / max(1, tokens.n_bytes)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}


def score(config: Config) -> dict[str, Any]:
    """Scores a run on a whole split, as eval.split and eval.checkpoint say: all its tokens but those that packing=pad cuts off.

    Args:
        config: the resolved config of the run, which names its folder.

    Raises:
        ConfigError: the run, its checkpoint or its data are not there or do not fit the config.
    """
    mesh = make_mesh(config.mesh)
    corpus = prepare(config.data, jax.process_count(), jax.process_index())
    agreed("data", corpus.fingerprints)
    config = config.with_vocab(corpus.tokenizer.n_vocab)
    check_fits(config, mesh)
    with closing(Checkpoints(config, read_only=True)) as checkpoints:
        step = checkpoints.chosen()
        checkpoints.check_same(step, pipeline.fingerprint(corpus.splits["train"], config.data, config.seed))
        state, _ = checkpoints.restore(step, plan(config, mesh).shapes)
    held_out, n_vocab = corpus.splits[config.eval.split], corpus.tokenizer.n_vocab
    batches = pipeline.eval_batches(held_out, config.data, None, *data_share(mesh), n_vocab)
    model, targets = evaluate(make_eval_step(config, mesh, corpus.tokenizer.bos_id), state.params, batches, mesh, held_out)
    counted = {}
    if targets == held_out.n_tokens:  # else, with packing=pad, what is cut off a document would count for them alone
        counted = ngram_losses(corpus.splits["train"].first(COUNTED), held_out.first(COUNTED), n_vocab)
    return {
        "run": str(config.rundir),
        "step": step,
        "split": config.eval.split,
        "tokens": held_out.n_tokens,
        "scored": targets,
        "bytes": held_out.n_bytes,
        "model": model,
        **{name: results(loss, held_out) for name, loss in counted.items()},
    }


def ngram_losses(train: Integer[np.ndarray, " n"], held_out: Integer[np.ndarray, " m"], n_vocab: int) -> dict[str, float]:
    """What counting gives: nats a token on held-out tokens of a unigram and a bigram model of the training tokens.

    Unigram counts have one added to each. Bigram counts are smoothed towards the unigram with a Dirichlet prior (MacKay and Peto,
    1995) whose weight is the one of a small grid that does best on the held-out tokens: a bound in the bigram's favour.
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
