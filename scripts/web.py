"""Open a page that captions images and videos: `python scripts/web.py`, then http://127.0.0.1:7860."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["web", *sys.argv[1:]])
