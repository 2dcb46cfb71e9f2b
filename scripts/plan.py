"""`mutransformer plan` from a source tree: python scripts/plan.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
