"""`mutransformer train-tokenizer` from a source tree: python scripts/train_tokenizer.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
