"""What a finished run leaves: captions of held-out clips to score, and a checkpoint of any layout."""

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from aurora.checkpoint.convert import convert
from aurora.checkpoint.pretrained import save_model
from aurora.data.tinyworld.language import Category, caption_prompts
from aurora.model.captioner import AuroraModel
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.chat import build_prompt, tokenize_prompt
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer
from aurora.processing.video import AuroraVideoProcessor
from aurora.training.bank import ClipBank
from aurora.training.frames_task import PixelTable
from aurora.training.lora import merge_lora

MAX_CAPTION_TOKENS = 128


@torch.inference_mode()
def caption_clips(
    model: AuroraModel,
    tokenizer: Tokenizer,
    bank: ClipBank,
    rows: Iterable[int],
    *,
    frame_template: str,
    token_kept_ratio: float,
    categories: Sequence[Category] = tuple(Category),
) -> list[dict[str, str]]:
    """Write the structured captions of clips greedily, each clip encoded once.

    Args:
        model: Trained captioner.
        tokenizer: Its tokenizer.
        bank: Rendered clips.
        rows: Rows of the bank to caption.
        frame_template: Text around each frame's placeholder.
        token_kept_ratio: Share of the visual tokens to keep, exactly.
        categories: Captions to write.

    Returns:
        For each row, category -> caption.
    """
    facade = AuroraForConditionalGeneration(model).eval()
    pixels = pixel_table(ImageConfig())
    index, num_frames = model.config.image_token_index, bank.frames.shape[1]
    prompts = [build_prompt(caption_prompts(category)[0], num_frames, frame_template) for category in categories]
    ids = [tokenize_prompt(prompt, tokenizer, index) for prompt in prompts]
    width = max(map(len, ids))
    input_ids = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    written = []
    for row in rows:
        prefix = facade.encode(
            pixel_values_videos=pixels(bank.frames[[row]]), token_kept_ratio=token_kept_ratio, schedule="exact"
        )
        output = facade.generate(
            input_ids, attention_mask=attention_mask, prefix=prefix, max_new_tokens=MAX_CAPTION_TOKENS, temperature=0.0
        )
        assert isinstance(output, torch.Tensor)
        written.append({c.value: tokenizer.decode(ids) for c, ids in zip(categories, output, strict=True)})
    return written


def export_checkpoint(
    model: AuroraModel, tokenizer: Tokenizer, folder: Path, *, num_frames: int, frame_template: str
) -> None:
    """Write weights in float16, tokenizer and processor, in the layout of the 7B checkpoints.

    Args:
        model: Trained captioner; it is left in float16.
        tokenizer: Its tokenizer.
        folder: Where to; made when missing, other files in it stay.
        num_frames: Frames of a clip.
        frame_template: Text around each frame's placeholder.
    """
    image = ImageConfig(image_size=model.config.vision.image_size)
    image_processor = AuroraImageProcessor(image)
    processor = AuroraProcessor(
        image_processor,
        tokenizer,
        AuroraVideoProcessor(image_processor, num_frames=num_frames),
        frame_template=frame_template,
        image_token_index=model.config.image_token_index,
    )
    export_model(model, processor, folder, image_aspect_ratio=image.aspect_ratio.value)


def export_model(
    model: AuroraModel, processor: AuroraProcessor, folder: Path, *, layout: str = "aurora", image_aspect_ratio: str
) -> None:
    """Write a trained captioner as a checkpoint with everything beside the weights.

    Weights are written in float16 as the released ones are, or in bfloat16 where one of them is too large for that.

    Args:
        model: Trained captioner; it is left in the dtype written, adapters folded in.
        processor: Its tokenizer and processors.
        folder: Where to; made when missing. Weights appear whole or not at all, other files in it stay.
        layout: A name of `aurora.checkpoint.LAYOUTS`.
        image_aspect_ratio: pad, crop, squash or native, as it was trained.

    Raises:
        ValueError: if a weight is not finite.
        CheckpointError: if the layout cannot hold the model, or the disk refuses.
    """
    merge_lora(model)
    model = model.to(_export_dtype(model))
    if layout == "aurora":
        processor.save_pretrained(folder)
        save_model(model, folder, image_aspect_ratio=image_aspect_ratio)
        return
    # What other readers want beside the weights, a conversion knows.
    staged = folder.parent / f".exporting-{folder.name}"
    shutil.rmtree(staged, ignore_errors=True)  # of an export that was killed
    try:
        processor.save_pretrained(staged)
        save_model(model, staged, image_aspect_ratio=image_aspect_ratio)
        convert(staged, folder, layout=layout, overwrite=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _export_dtype(model: AuroraModel) -> torch.dtype:
    largest = {name: float(tensor.abs().max()) for name, tensor in model.state_dict().items() if tensor.numel()}
    if broken := [name for name, value in largest.items() if not math.isfinite(value)]:
        raise ValueError(f"{broken[0]}: holds NaN or infinity ({len(broken)} such tensors), want finite weights")
    return torch.float16 if max(largest.values()) <= torch.finfo(torch.float16).max else torch.bfloat16


def pixel_table(image: ImageConfig) -> PixelTable:
    """Return the normalisation that the exported image processor applies to frames of its size."""
    return PixelTable(image.mean, image.std)
