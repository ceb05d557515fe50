"""Train by a recipe: `python scripts/train.py experiment=aurora_tiny`."""

from aurora.cli import run
from aurora.training.run import main

if __name__ == "__main__":
    run(main)
