"""Turn a checkpoint into another layout: `python scripts/convert.py model_path=... output=... layout=llava_hf`."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
