"""Check a dataset and tokenise it to disk: `python scripts/prepare.py data.path=my/data.jsonl`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
