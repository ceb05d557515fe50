"""How much memory a row of a batch needs, so that a batch can be as large as fits.

The estimate counts what grows with the rows: keys and values, the activations of reading the prompt, logits and pixels.
Weights are there already, and the vision tower takes a bounded number of frames at a time.
"""

from __future__ import annotations

import torch

from aurora.model.captioner import AuroraModel
from aurora.model.products import free_memory_bytes

SHARE = 0.5
"""Of the free memory, what batches may use: an estimate is one, and others use the machine, too."""


def row_bytes(model: AuroraModel, *, prompt_tokens: int, new_tokens: int, num_pixels: int, num_beams: int = 1) -> int:
    """Estimate the memory of one row at its largest.

    Args:
        model: The captioner.
        prompt_tokens: Text and visual tokens of the prompt.
        new_tokens: Tokens of the answer.
        num_pixels: Values of all its frames.
        num_beams: Answers that grow side by side.

    Returns:
        Bytes.
    """
    text = model.config.text
    item = torch.finfo(model.dtype).bits // 8
    new_tokens = max(0, min(new_tokens, text.max_seq_len - prompt_tokens))
    slots = prompt_tokens + num_beams * new_tokens
    # A cache that grows holds its old slots and the new ones, half as many again, for a moment.
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * item * slots * 5 // 2
    reading = prompt_tokens * (3 * text.intermediate_size + 8 * text.hidden_size) * item
    logits = 6 * 4 * num_beams * text.vocab_size
    return cache + reading + logits + 2 * num_pixels * item


def available_bytes(device: torch.device) -> int | None:
    """Memory that batches on a device may use, None where it cannot be told."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE * (free + unused))
    if device.type != "cpu":
        return None
    free_bytes = free_memory_bytes()
    return None if free_bytes is None else int(SHARE * free_bytes)
