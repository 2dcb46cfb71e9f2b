"""Shows what a run trains on: python scripts/inspect_data.py configs/small.yaml [key=value ...] [--rows N] [--batch K]

Counts by source and split, then rows of a training batch: each document in a row on a line of its own, with its place in the row,
and with data.intra_document_mask=true its segment.
"""

import sys
from argparse import Namespace

from mutransformer.config import load as settings
from mutransformer.config.schema import ConfigError, check
from mutransformer.sharding.processes import command, guarded, prepare_jax


def main() -> int:
    parser = command(__doc__ or "")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (3)")
    parser.add_argument("--batch", type=int, default=0, metavar="K", help="of which batch, counted from 0 (0)")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given: Namespace) -> int:
    config = settings.load(given.args)
    for key in ("rows", "batch"):
        check(getattr(given, key) >= 0, f"--{key} {getattr(given, key)}: must not be negative")
    prepare_jax(config.distributed)
    from contextlib import closing

    from mutransformer.data.batches.pipeline import train_batches
    from mutransformer.data.batches.rows import rows_of
    from mutransformer.data.cache.prepare import prepare
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    corpus = prepare(config.data)
    tokenizer = corpus.tokenizer
    print(f"vocabulary: {tokenizer.n_vocab:,} ids; bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}")
    for split, text in corpus.splits.items():
        total = sum(text.weights)
        for tokens, weight in zip(text.sources, text.weights, strict=True):
            n = len(rows_of(tokens, config.data))
            share = f", {weight / total:.1%} of the rows" if split == "train" and len(text.sources) > 1 else ""
            print(f"{tokens.source} {split}: {tokens.n_documents:,} documents, {tokens.n_tokens:,} tokens, {n:,} rows{share}")
    with closing(train_batches(corpus.splits["train"], config.data, config.seed, 1, (0,), tokenizer.n_vocab)) as batches:
        batches.set_state({"next_index": given.batch})
        shown = next(batches, None)
    if shown is None:
        raise ConfigError(f"--batch {given.batch}: so many batches are never drawn")
    for row, (ids, mask) in enumerate(zip(shown.tokens[: given.rows], shown.mask[: given.rows], strict=True)):
        print(f"\nbatch {given.batch}, row {row}: {mask.sum()} of {len(ids)} tokens count")
        segments = None if shown.segments is None else shown.segments[row]
        ends_here = ids[:-1] == tokenizer.eos_id if segments is None else segments[1:] != segments[:-1]
        start, n = 0, int(mask.sum())
        for stop in [*(k + 1 for k in ends_here.nonzero()[0].tolist() if k + 1 < n), n]:
            if stop > start:
                text = tokenizer.decode(ids[start:stop])
                ends = "eos" if ids[stop - 1] == tokenizer.eos_id else "..."
                which = "" if segments is None else f"segment {segments[start]}: "
                shortened = f"{text[:70]!r}{' ... ' + repr(text[-20:]) if len(text) > 90 else ''}"
                print(f"  {start:5}-{stop - 1:<5} {which}{shortened} {ends}")
                start = stop
        if start < len(ids):
            print(f"  {start:5}-{len(ids) - 1:<5} filled up, does not count")
    return 0


if __name__ == "__main__":
    sys.exit(main())
