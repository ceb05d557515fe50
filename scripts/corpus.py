"""Caption a large collection with several workers: `python scripts/corpus.py visual_input="clips/**/*.mp4"`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["corpus", *sys.argv[1:]])
