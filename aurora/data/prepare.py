"""The verb `prepare`: check a dataset, say what is in it, and tokenise it once for all later runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig

from aurora.checkpoint.pretrained import read_config, resolve_checkpoint
from aurora.config import load_config, register_schema
from aurora.data.datasets import ConversationData, open_data
from aurora.data.records import KINDS, DataConfig, DataError
from aurora.data.shards import TarMedia, find_shards
from aurora.data.tokens import FrameTokens
from aurora.model.captioner import AuroraConfig
from aurora.model.merge import MergeConfig, plan_clip
from aurora.model.vision import num_active_layers
from aurora.processing.image import AspectRatio
from aurora.processing.processor import AuroraProcessor

_BUNDLED_MODEL = Path(__file__).parents[1] / "assets" / "aurora-tiny"


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Check conversations and their media, count what training will see, tokenise to disk, unpack tar parts."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data, as `train` takes it."""
    model_path: str | None = None
    """Checkpoint folder whose tokenizer and tower are used; null is the bundled aurora-tiny."""
    token_kept_ratio: float = 1.0
    """Kept ratio of training, for the lengths; in (0, 1]."""
    image_aspect_ratio: AspectRatio | None = None
    """pad | crop | squash | native; null is the checkpoint's."""
    decode: bool = False
    """Also decode every image and video, and list those that cannot be read."""
    extract_to: str | None = None
    """Folder to unpack the tar shards of `data.media` into; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        if not 0 < self.token_kept_ratio <= 1:
            raise ValueError(f"token_kept_ratio={self.token_kept_ratio}: want a number in (0, 1]")


def frame_tokens(model: AuroraConfig, merge: MergeConfig) -> FrameTokens:
    """Return how many visual tokens each frame of a clip becomes, as `open_data` asks for it.

    Args:
        model: The model; its weights are not needed.
        merge: How training merges.
    """
    active = num_active_layers(model.vision, model.feature_layer)
    prefix = model.vision.num_prefix_tokens if model.feature_select_strategy == "full" else 0

    def count(num_frames: int, height_px: int, width_px: int) -> list[int]:
        plans = plan_clip(
            merge,
            num_frames=num_frames,
            height_px=height_px,
            width_px=width_px,
            vision=model.vision,
            num_active_layers=active,
        )
        return [prefix + plan.num_visual_tokens for plan in plans]

    return count


def prepare(config: PrepareConfig) -> ConversationData:
    """Do what the verb does and print what was found.

    Args:
        config: What to do.

    Returns:
        The data.

    Raises:
        ValueError: after the mistakes were printed, if there are any.
    """
    if config.extract_to is not None:
        _extract(config.data, Path(config.extract_to).expanduser())
    folder = resolve_checkpoint(config.model_path if config.model_path is not None else str(_BUNDLED_MODEL))
    processor = AuroraProcessor.from_pretrained(folder)
    model = read_config(folder)[1]
    if config.image_aspect_ratio is not None:
        processor.image_processor.config.aspect_ratio = config.image_aspect_ratio
    processor.image_processor.config.patch_size = model.vision.patch_size
    unreadable: list[str] = []
    try:
        data = open_data(
            config.data,
            processor.tokenizer,
            processor.image_processor,
            image_token_index=processor.image_token_index,
            frame_template=processor.frame_template,
            tokens_per_placeholder_fn=frame_tokens(model, MergeConfig(token_kept_ratio=config.token_kept_ratio)),
            report=unreadable.append,
        )
    except DataError as error:
        print("\n".join(map(str, error.mistakes)), file=sys.stderr)
        raise ValueError(f"{error.summary}; want none") from None
    print(table(data))
    if config.data.cache_dir is not None:
        print(f"tokens {'found' if data.from_cache else 'written'} in {config.data.cache_dir}")
    if config.decode:
        _decode(data)
    return data


def table(data: ConversationData) -> str:
    """Return a table of the samples of each source: kinds, lengths, how many ids are learned."""
    found = data.table
    header = ("source", "samples", "weight", *KINDS, "length p50", "p95", "max", "learned tokens")
    rows: list[tuple[str, ...]] = [header]
    learned = np.add.reduceat(found.learned, found.starts[:-1], dtype=np.int64)
    named = data.config.all_sources()
    for number, (name, source) in enumerate(named.items()):
        own = found.sources == number
        lengths = found.lengths[own]
        kinds = [int((found.kinds[own] == kind).sum()) for kind in range(len(KINDS))]
        half, most = (int(value) for value in np.percentile(lengths, (50, 95), method="lower"))
        numbers = (
            int(own.sum()),
            f"{source.weight:g}",
            *kinds,
            half,
            most,
            int(lengths.max()),
            int(learned[own].sum()),
        )
        rows.append((name, *map(str, numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, f"{len(data)} samples, {data.sampler.epoch_size} in an epoch"])


def _extract(data: DataConfig, folder: Path) -> None:
    shards = [source.media for source in data.all_sources().values() if source.media is not None]
    packed = [media for media in shards if not Path(media).expanduser().is_dir()]
    if not packed:
        raise ValueError(f"extract_to={folder}: data.media names no tar files; want a tar or a glob of tar parts")
    for media in packed:
        archives = TarMedia(find_shards(media))
        print(f"{media}: {archives.extract(folder)} of {len(archives.names)} files written to {folder}")


def _decode(data: ConversationData) -> None:
    """Read every sample once."""
    broken: list[str] = []
    for index in range(len(data)):
        if (problem := data.problem(index)) is not None:
            broken.append(problem)
            print(problem, file=sys.stderr)
            if len(broken) >= data.config.max_mistakes:
                break
    if broken:
        raise ValueError(f"data: {len(broken)} of {len(data)} samples cannot be read; want none")
    print(f"all {len(data)} samples can be read")


register_schema("prepare_schema", PrepareConfig)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="prepare")
def main(raw: DictConfig) -> None:
    """Prepare the data the command line names; called through `aurora.cli.run`."""
    prepare(load_config(raw, PrepareConfig))
