"""`mutransformer import` from a source tree: python scripts/import.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
