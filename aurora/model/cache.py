"""Static key-value cache of the language model.

Shape letters: B rows, S slots, K key heads, D head width.
"""

import torch
from torch import Tensor

from aurora.model.llama import LlamaConfig


class KVCache:
    """Keys and values of every layer in memory allocated once; slots fill from the left, alike in every row."""

    def __init__(
        self, config: LlamaConfig, *, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Allocate the cache.

        Args:
            config: Language model.
            batch_size: Rows B.
            max_length: Slots S; running past them is an error.
            device: Where the model is.
            dtype: Of keys and values.
        """
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        """Filled slots."""

    @property
    def max_length(self) -> int:
        """Slots S."""
        return self.keys.shape[3]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the filled slots of one layer.

        `length` moves only with `advance`, after the last layer.

        Args:
            layer: Layer index.
            k: New keys, (B, T, K, D).
            v: New values, (B, T, K, D).

        Returns:
            All keys and all values of the layer, (B, length + T, K, D), as views.

        Raises:
            ValueError: if the slots do not suffice.
        """
        end = self.length + k.shape[1]
        if end > self.max_length:
            raise ValueError(f"KVCache: {end} tokens, but it was made for {self.max_length}")
        self.keys[layer, :, :, self.length : end] = k.transpose(1, 2)
        self.values[layer, :, :, self.length : end] = v.transpose(1, 2)
        return self.keys[layer, :, :, :end].transpose(1, 2), self.values[layer, :, :, :end].transpose(1, 2)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every layer has now written."""
        self.length += num_tokens

    def grow(self, max_length: int) -> None:
        """Move to at least `max_length` slots, keeping what is filled."""
        if max_length <= self.max_length:
            return
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], max_length, old.shape[4])
            new[:, :, :, : self.length] = old[:, :, :, : self.length]
            setattr(self, name, new)
