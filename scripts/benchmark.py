"""`mutransformer benchmark` from a source tree: python scripts/benchmark.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
