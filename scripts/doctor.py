"""`mutransformer doctor` from a source tree: python scripts/doctor.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
