"""Masks over the vocabulary that travel to the device as one bit a token."""

from __future__ import annotations

import mlx.core as mx

WORD_BITS = 32


def unpack(packed: mx.array, vocab_size: int) -> mx.array:
    """One bool per token of a packed mask.

    Args:
        packed: (B, ceil(V / 32)) uint32; token t is bit t % 32 of word t // 32.
        vocab_size: V.

    Returns:
        (B, V) bool.
    """
    B, num_words = packed.shape
    bits = (packed[:, :, None] >> mx.arange(WORD_BITS, dtype=mx.uint32)) & 1  # (B, V / 32, 32)
    return bits.astype(mx.bool_).reshape(B, num_words * WORD_BITS)[:, :vocab_size]
