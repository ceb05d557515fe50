"""The verb `tinyworld`: write a dataset of clips, conversations and facts to disk."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from aurora.config import load_config, register_schema
from aurora.data.tinyworld.dataset import DatasetConfig, write_dataset

register_schema("tinyworld_schema", DatasetConfig)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="tinyworld")
def main(raw: DictConfig) -> None:
    """Write the dataset the command line names; called through `aurora.cli.run`."""
    print(write_dataset(load_config(raw, DatasetConfig), progress=sys.stderr.isatty()))
