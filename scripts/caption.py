"""Caption an image, a video, a folder or a glob: `python scripts/caption.py visual_input=clip.mp4`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])
