"""Score a captioner on TinyWorld clips: `python scripts/evaluate.py experiment=tinyvdc`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
