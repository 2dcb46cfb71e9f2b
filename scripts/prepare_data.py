"""`mutransformer prepare-data` from a source tree: python scripts/prepare_data.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-data", *sys.argv[1:]]))
