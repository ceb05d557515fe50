"""Write a TinyWorld dataset to disk: `python scripts/tinyworld.py split=train num_clips=1000`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["tinyworld", *sys.argv[1:]])
