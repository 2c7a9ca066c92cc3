"""Packed masks of a batch, unpacked on the device."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from lfm_mlx.engine.request import PackedMask

WORD_BITS = 32


def batch_mask(masks: Sequence[PackedMask | None], vocab_size: int) -> mx.array | None:
    """The masks of all rows as bool ``(B, V)``, or None where no row has one; 16 kB a row travel at V = 128,000."""
    if all(mask is None for mask in masks):
        return None
    num_words = -(-vocab_size // WORD_BITS)
    packed = np.full((len(masks), num_words), -1, dtype=np.int32)
    for row, mask in enumerate(masks):
        if mask is not None:
            packed[row] = 0
            packed[row, : min(mask.size, num_words)] = mask.reshape(-1)[:num_words]
    words = mx.array(packed.view(np.uint32))
    bits = (words[..., None] >> mx.arange(WORD_BITS, dtype=mx.uint32)) & 1
    return bits.astype(mx.bool_).reshape(len(masks), -1)[:, :vocab_size]
