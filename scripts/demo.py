"""Caption the bundled clips at several kept ratios and draw what merged: `python scripts/demo.py`."""

from aurora.cli import one_line_errors
from aurora.demo import demo

if __name__ == "__main__":
    with one_line_errors():
        demo()
