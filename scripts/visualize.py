"""Draw what merged: `python scripts/visualize.py visual_input=clip.mp4 output=merged.png` (.svg, .gif, .mp4, .html)."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["visualize", *sys.argv[1:]])
