"""`mutransformer coord-check` from a source tree: python scripts/coord_check.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["coord-check", *sys.argv[1:]]))
