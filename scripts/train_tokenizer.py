"""Trains a SentencePiece model on a train split: python scripts/train_tokenizer.py [FILE.yaml] [key=value ...] --out my.model

To use it: data.tokenizer=sentencepiece data.tokenizer_file=my.model
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from mutransformer.launch import launch


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the file to write")


def main(config, out):
    from mutransformer.data.corpus import train_tokenizer
    from mutransformer.data.tokenize import SentencePieceTokenizer

    train_tokenizer(config.data, out)
    print(f"{out}: {SentencePieceTokenizer(out).n_vocab} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, __doc__ or "", options=options))
