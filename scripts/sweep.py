"""`mutransformer sweep` from a source tree: python scripts/sweep.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
