"""Time our code against its alternatives: `python scripts/benchmark.py suite=encoder`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
