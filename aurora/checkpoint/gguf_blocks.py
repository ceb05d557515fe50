"""Block formats of GGUF tensors, decoded to float32 with NumPy.

A quantised row is cut into blocks of 32 weights (Q4_0 to Q8_0) or 256 (the K formats). A block holds small integers q
and a half-precision step d, so that a weight is d * q, or d * q + m with an offset m. A K block has 8 or 16 sub-blocks,
whose own steps and offsets are small integers again. Byte order and bit positions follow ggml's published definition of
each format.

Shape letters: K blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How one tensor type is stored."""

    name: str
    """ggml's name."""
    num_weights: int
    """Weights of a block; a row is a whole number of blocks."""
    num_bytes: int
    """Bytes of a block."""
    decode: Callable[[Bytes], Floats]
    """(K, num_bytes) uint8 -> (K, num_weights) float32."""


def _half(blocks: Bytes, start: int) -> Floats:
    """Half-precision number at a byte position, (K, 1)."""
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _fields(packed: Bytes, *shifts: int, mask: int) -> Bytes:
    """Cut each byte of (K, n) into fields, (K, len(shifts), n): all bytes' first field, then all their second."""
    return (packed[:, None] >> np.array(shifts, dtype=np.uint8)[None, :, None]) & np.uint8(mask)


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves of all bytes, then high halves, (K, 2 n)."""
    return _fields(packed, 0, 4, mask=15).reshape(len(packed), -1)


def _f32(blocks: Bytes) -> Floats:
    return blocks.copy().view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _with_fifth_bit(low: Bytes, high: Bytes) -> Floats:
    """Put bit i of four bytes on top of nibble i, (K, 32)."""
    return (_nibbles(low) | (np.unpackbits(high, axis=1, bitorder="little") << 4)).astype(np.float32)


def _q5_0(blocks: Bytes) -> Floats:
    return (_with_fifth_bit(blocks[:, 6:], blocks[:, 2:6]) - 16) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    return _with_fifth_bit(blocks[:, 8:], blocks[:, 4:8]) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _two_bits(packed: Bytes) -> Bytes:
    """Unpack the 64 bytes that hold two bits of 256 weights, 32 bytes for each half of them, (K, 256)."""
    return _fields(packed.reshape(-1, 32), 0, 2, 4, 6, mask=3).reshape(-1, 256)


def _q2_k(blocks: Bytes) -> Floats:
    steps, offsets = (blocks[:, :16] & 15).astype(np.float32), (blocks[:, :16] >> 4).astype(np.float32)
    q = _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16)
    weights = (steps * _half(blocks, 80))[..., None] * q - (offsets * _half(blocks, 82))[..., None]
    return weights.reshape(-1, 256)


def _q3_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 96:104])  # (K, 16)
    high = _fields(blocks[:, 104:108], 0, 2, 4, 6, mask=3).reshape(-1, 16)
    steps = (low | (high << 4)).astype(np.float32) - 32
    third = _fields(blocks[:, :32], *range(8), mask=1).reshape(-1, 256)
    q = (_two_bits(blocks[:, 32:96]) | (third << 2)).astype(np.float32) - 4
    return ((steps * _half(blocks, 108))[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


def _six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """Unpack 12 bytes into the 6-bit steps and offsets of 8 sub-blocks, (K, 8) each.

    The first four of either are the low six bits of a byte; of the last four, the low nibbles share four bytes and the
    high two bits are what the first eight bytes have left.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    steps = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    offsets = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return steps.astype(np.float32), offsets.astype(np.float32)


def _with_offsets(blocks: Bytes, q: Bytes) -> Floats:
    """Scale (K, 8, 32) integers by the header that Q4_K and Q5_K share."""
    steps, offsets = _six_bit_pairs(blocks[:, 4:16])
    weights = (steps * _half(blocks, 0))[..., None] * q - (offsets * _half(blocks, 2))[..., None]
    return weights.reshape(-1, 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _with_offsets(blocks, _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    fifth = _fields(blocks[:, 16:48], *range(8), mask=1)  # (K, 8, 32)
    return _with_offsets(blocks, _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32) | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    q = (low | (_two_bits(blocks[:, 128:192]) << 4)).astype(np.float32) - 32
    steps = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)  # (K, 16)
    return (steps[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


_Row = tuple[int, str, int, int, Callable[[Bytes], Floats]]
_TABLE: tuple[_Row, ...] = (
    (0, "F32", 1, 4, _f32),
    (1, "F16", 1, 2, _f16),
    (2, "Q4_0", 32, 18, _q4_0),
    (3, "Q4_1", 32, 20, _q4_1),
    (6, "Q5_0", 32, 22, _q5_0),
    (7, "Q5_1", 32, 24, _q5_1),
    (8, "Q8_0", 32, 34, _q8_0),
    (10, "Q2_K", 256, 84, _q2_k),
    (11, "Q3_K", 256, 110, _q3_k),
    (12, "Q4_K", 256, 144, _q4_k),
    (13, "Q5_K", 256, 176, _q5_k),
    (14, "Q6_K", 256, 210, _q6_k),
    (30, "BF16", 1, 2, _bf16),
)

FORMATS: dict[int, BlockFormat] = {
    number: BlockFormat(name=name, num_weights=weights, num_bytes=size, decode=decode)
    for number, name, weights, size, decode in _TABLE
}
"""Tensor type in the file -> its format."""
