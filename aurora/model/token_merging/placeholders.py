"""Placeholders in the prompt of Hugging Face's LLaVA, one for each visual feature: fewer after merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aurora.model.token_merging.towers import find_tower


@dataclass(kw_only=True, slots=True)
class LlavaPrompt:
    """How a LLaVA counts image tokens."""

    image_token_id: int
    """Id of a placeholder."""
    pad_token_id: int
    """Id that fills rows."""
    num_extra_tokens: int
    """Features of an image beside its visual tokens: the class token if it is kept; -1 where a patch is dropped."""

    def num_features(self, num_visual_tokens: int) -> int:
        """Features that reach the language model of an image with so many visual tokens."""
        return num_visual_tokens + self.num_extra_tokens

    def shorten(self, input_ids: Tensor, attention_mask: Tensor | None, full: int, kept: int) -> tuple[Tensor, Tensor]:
        """Keep the first `kept` of each `full` placeholders.

        Args:
            input_ids: Token ids, (B, T).
            attention_mask: 1 where a token is, (B, T); None: everywhere.
            full: Placeholders that stand for one image.
            kept: Placeholders that shall.

        Returns:
            Ids and mask, (B, T'), padded on the left.

        Raises:
            ValueError: if a row does not hold whole images.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_image = input_ids == self.image_token_id
        for row, count in enumerate(is_image.sum(1).tolist()):
            if count % full:
                raise ValueError(f"row {row}: {count} image tokens, want {full} for each image before merging")
        number = is_image.cumsum(1) - 1
        keep = ~is_image | (number % full < kept)
        length = int(keep.sum(1).max())
        ids = input_ids.new_full((len(input_ids), length), self.pad_token_id)
        new_mask = mask.new_zeros(ids.shape)
        for row, chosen in enumerate(keep):
            count = int(chosen.sum())
            ids[row, length - count :] = input_ids[row, chosen]
            new_mask[row, length - count :] = mask[row, chosen]
        return ids, new_mask


def llava_prompt(module: nn.Module) -> LlavaPrompt | None:
    """Read a LLaVA's way of counting; None for a tower alone."""
    config = getattr(module, "config", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if config is None or strategy is None:
        return None
    pad = getattr(config, "pad_token_id", None)
    pad = getattr(config.text_config, "pad_token_id", None) if pad is None else pad
    # "default" drops the first token whatever it is: of SigLIP, which has no class token, a patch.
    return LlavaPrompt(
        image_token_id=int(config.image_token_id),
        pad_token_id=int(pad or 0),
        num_extra_tokens=find_tower(module).num_prefix_tokens - (strategy == "default"),
    )
