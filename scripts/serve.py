"""Answer clients of OpenAI's chat completions: `python scripts/serve.py`, then http://127.0.0.1:8000/v1."""

import sys

from aurora.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
