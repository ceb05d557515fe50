"""Render the bundled clips of TinyWorld into aurora/assets/media: `python scripts/make_media.py [folder]`."""

import sys
from pathlib import Path

from aurora.cli import one_line_errors
from aurora.data.bundled import MEDIA, make_media

if __name__ == "__main__":
    with one_line_errors():
        make_media(Path(sys.argv[1]) if len(sys.argv) > 1 else MEDIA)
