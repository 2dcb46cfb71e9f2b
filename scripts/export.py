"""`mutransformer export` from a source tree: python scripts/export.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
