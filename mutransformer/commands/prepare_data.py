"""Tokenize the data of a config into data.cache_dir.

Example: mutransformer prepare-data small data.source=text 'data.files=[books/*.txt]'

Training does the same if the cache lacks something. The same command resumes after an interruption.
"""

from argparse import ArgumentParser, Namespace

from mutransformer.commands import DATA_KEYS, start
from mutransformer.errors import FINISHED, redact

KEYS = (*DATA_KEYS, "data.column", "data.sources", "data.tokenize_workers", "data.validation_fraction", "data.test_fraction")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, without doing it")


def run(args: Namespace) -> int:
    config = start(args.settings)
    from mutransformer.data.cache.prepare import dry_run, prepare
    from mutransformer.sharding.processes import all_processes

    if args.dry_run:
        print("\n".join(dry_run(config.data)))
        return FINISHED
    corpus = prepare(config.data, all_processes())
    for split, text in corpus.splits.items():
        for tokens in text.sources:
            print(
                f"{tokens.source} {split}: {tokens.n_documents:,} documents, {tokens.n_tokens:,} tokens, "
                f"{tokens.n_bytes / max(1, tokens.n_tokens):.2f} bytes each, {len(tokens.sections)} shards"
            )
    print(f"vocabulary: {corpus.tokenizer.n_vocab:,} ids; kept below {redact(config.data.cache_dir)}")
    return FINISHED
