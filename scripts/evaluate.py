"""`mutransformer evaluate` from a source tree: python scripts/evaluate.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
