"""`mutransformer report` from a source tree: python scripts/transfer_report.py --help"""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
