"""Show what a run trains on: counts by source and split, then rows of a training batch.

Example: mutransformer inspect-data small --rows 3 --batch 0

Each row names its source. Each document in it has a line of its own with its positions in the row and, with
data.intra_document_mask=true, its segment. Below are the first tokens of the row: ids and pieces of the vocabulary.
"""

import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from contextlib import closing
from typing import Any

from mutransformer.commands import DATA_KEYS, start_jax
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, ConfigError, check

KEYS = (*DATA_KEYS, "data.packing", "data.intra_document_mask", "data.seq_len", "data.batch_size", "seed")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens of each row to show by id (default: 16)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--batch", type=int, default=0, metavar="K", help="index of the batch, from 0 (default: 0)")
    which.add_argument("--step", type=int, metavar="N", help="the batch of the training step N, from 1")


def run(args: Namespace) -> int:
    config = load(args.settings)
    check(args.step is None or args.step >= 1, f"--step {args.step}: must be at least 1")
    args.batch = args.batch if args.step is None else args.step - 1
    for option, value in (("--rows", args.rows), ("--batch", args.batch), ("--tokens", args.tokens)):
        check(value >= 0, f"{option} {value}: must not be negative")
    start_jax(config)
    from mutransformer.data.batches.pipeline import train_batches
    from mutransformer.data.batches.rows import rows_of
    from mutransformer.data.cache.prepare import prepare
    from mutransformer.sharding.processes import all_processes

    corpus = prepare(config.data, all_processes())
    tokenizer = corpus.tokenizer
    print(f"vocabulary: {tokenizer.n_vocab:,} ids; bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}")
    sizes: dict[str, int] = {}  # rows to train on, by source
    for split, text in corpus.splits.items():
        total = sum(text.weights)
        for tokens, weight in zip(text.sources, text.weights, strict=True):
            n = len(rows_of(tokens, config.data))
            sizes |= {tokens.source: n} if split == "train" else {}
            share = f", {weight / total:.1%} of the rows" if split == "train" and len(text.sources) > 1 else ""
            print(f"{tokens.source} {split}: {tokens.n_documents:,} documents, {tokens.n_tokens:,} tokens, {n:,} rows{share}")
    with closing(train_batches(corpus.splits["train"], config.data, config.seed, 1, (0,), tokenizer.n_vocab)) as batches:
        batches.set_state({"next_index": args.batch})
        batch, indices = next(batches, None), batches.rows(args.batch)
    if batch is None:
        raise ConfigError(f"--batch {args.batch}: so many batches are never drawn")
    for row in range(min(args.rows, len(batch.tokens))):
        counted = f"{batch.mask[row].sum()} of {len(batch.tokens[row])} tokens count"
        source, index = _locate(indices[row], sizes)
        print(f"\nbatch {args.batch}, row {row}: row {index:,} of {source}, {counted}")
        _show_row(batch, row, tokenizer)
        _show_tokens(batch.tokens[row][: args.tokens].tolist(), tokenizer)
    return FINISHED


def _locate(index: int, sizes: dict[str, int]) -> tuple[str, int]:
    """The source of a row, and its index there. sizes: of the sources, whose rows follow one another."""
    for source, n in sizes.items():
        if index < n:
            return source, index
        index -= n
    raise AssertionError


def _show_tokens(ids: list[int], tokenizer: Any) -> None:
    """Prints ids with their pieces, as ID:PIECE, as many on a line as fit."""
    shown = (
        f"{token}:{tokenizer.piece(token)}".replace(" ", "\u2423").replace("\n", "\\n").replace("\t", "\\t") for token in ids
    )
    columns = shutil.get_terminal_size().columns
    print(
        textwrap.fill(" ".join(shown), columns, initial_indent="  tokens: ", subsequent_indent=" " * 10, break_long_words=False)
    )


def _show_row(batch: Any, row: int, tokenizer: Any) -> None:
    """Prints a line for each document, or part of one, in a row."""
    ids, n = batch.tokens[row], int(batch.mask[row].sum())
    segments = None if batch.segments is None else batch.segments[row]
    last = ids[:-1] == tokenizer.eos_id if segments is None else segments[1:] != segments[:-1]  # of its document
    start = 0
    for stop in [*(k + 1 for k in last.nonzero()[0].tolist() if k + 1 < n), n]:
        if stop > start:
            text = tokenizer.decode(ids[start:stop])
            end = "eos" if ids[stop - 1] == tokenizer.eos_id else "..."
            segment = "" if segments is None else f"segment {segments[start]}: "
            head = max(20, shutil.get_terminal_size().columns - 64)  # characters; line ends take two
            shortened = f"{text[:head]!r}{' ... ' + repr(text[-20:]) if len(text) > head + 20 else ''}"
            print(f"  {start:5}-{stop - 1:<5} {segment}{shortened} {end}")
            start = stop
    if start < len(ids):
        print(f"  {start:5}-{len(ids) - 1:<5} padding, does not count")
