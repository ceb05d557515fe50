"""What a finished run leaves: captions of held-out clips to score, and the bundled checkpoint."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

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
    save_model(model.half(), folder, image_aspect_ratio=image.aspect_ratio.value)
    AuroraProcessor(
        image_processor,
        tokenizer,
        AuroraVideoProcessor(image_processor, num_frames=num_frames),
        frame_template=frame_template,
        image_token_index=model.config.image_token_index,
    ).save_pretrained(folder)


def pixel_table(image: ImageConfig) -> PixelTable:
    """Return the normalisation that the exported image processor applies to frames of its size."""
    return PixelTable(image.mean, image.std)
