"""Trains a SentencePiece model on a train split: python scripts/train_tokenizer.py [FILE.yaml] [key=value ...] --out my.model

To use it: data.tokenizer=sentencepiece data.tokenizer_file=my.model
"""

import sys
from argparse import Namespace
from pathlib import Path

from mutransformer.config import load as settings
from mutransformer.sharding.processes import command, guarded, prepare_jax


def main() -> int:
    parser = command(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the file to write")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given: Namespace) -> int:
    config = settings.load(given.args)
    prepare_jax(config.distributed)
    from mutransformer.data.cache.prepare import train_tokenizer
    from mutransformer.data.tokenizers.sentencepiece import SentencePieceTokenizer

    train_tokenizer(config.data, given.out)
    print(f"{given.out}: {SentencePieceTokenizer(given.out).n_vocab} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
