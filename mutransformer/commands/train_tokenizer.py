"""Train a SentencePiece model on a train split.

Example: mutransformer train-tokenizer small data.vocab_size=8192 --out my.model

To use it: data.tokenizer=sentencepiece data.tokenizer_file=my.model
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import DATA_KEYS
from mutransformer.config.load import load
from mutransformer.errors import FINISHED
from mutransformer.sharding import processes

KEYS = (*DATA_KEYS, "data.column", "data.sources", "data.validation_fraction", "data.test_fraction")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the file to write")


def run(args: Namespace) -> int:
    config = load(args.settings)
    processes.prepare_jax(config)
    from mutransformer.data.cache.prepare import train_tokenizer
    from mutransformer.data.tokenizers.tokenizer import SentencePieceTokenizer

    train_tokenizer(config.data, args.out)
    print(f"{args.out}: {SentencePieceTokenizer(args.out).n_vocab} pieces")
    return FINISHED
