"""Score a captioner: `python scripts/evaluate.py experiment=tinyvdc`, or `experiment=vdc data.root=...`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
