"""Tokenises the data of a config into data.cache_dir: python scripts/prepare_data.py FILE.yaml [key=value ...] [--dry-run]

Training does the same where the cache lacks something. A run that was stopped goes on where it was.
"""

import sys
from argparse import Namespace

from mutransformer.config import load as settings
from mutransformer.sharding.processes import command, guarded, prepare_jax


def main() -> int:
    parser = command(__doc__ or "")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done, and do nothing")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given: Namespace) -> int:
    config = settings.load(given.args)
    prepare_jax(config.distributed)
    import jax

    from mutransformer.data.cache.prepare import plan, prepare
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    if given.dry_run:
        print("\n".join(plan(config.data)))
        return 0
    several = jax.distributed.is_initialized()
    corpus = prepare(config.data, *((jax.process_count(), jax.process_index()) if several else ()))
    for split, text in corpus.splits.items():
        for tokens in text.sources:
            print(
                f"{tokens.source} {split}: {tokens.n_documents:,} documents, {tokens.n_tokens:,} tokens, "
                f"{tokens.n_bytes / max(1, tokens.n_tokens):.2f} bytes each, {len(tokens.sections)} shards"
            )
    print(f"vocabulary: {corpus.tokenizer.n_vocab:,} ids; kept below {config.data.cache_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
