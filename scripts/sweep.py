"""Compare kept ratios, schedules, size biases, token orders and baselines on TinyWorld: `python scripts/sweep.py`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
