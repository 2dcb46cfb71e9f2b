"""`python -m mutransformer COMMAND ...`: the command line, where the installed command is not on the PATH."""

import sys

from mutransformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
