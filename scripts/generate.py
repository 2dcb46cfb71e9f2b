"""`mutransformer generate` from a source tree: python scripts/generate.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
