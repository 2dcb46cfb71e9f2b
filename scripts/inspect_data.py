"""`mutransformer inspect-data` from a source tree: python scripts/inspect_data.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect-data", *sys.argv[1:]]))
