"""Packed masks of a batch, unpacked on the device."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.engine.request import PackedMask
from lfm_mlx.sampling import WORD_BITS, unpack


def batch_mask(masks: Sequence[PackedMask | None], vocab_size: int) -> mx.array | None:
    """The masks of all rows as bool ``(B, V)``, or None where no row has one; 16 kB a row travel at V = 128,000."""
    if all(mask is None for mask in masks):
        return None
    import numpy as np  # takes a tenth of a second, and only grammars need it

    num_words = -(-vocab_size // WORD_BITS)
    packed = np.full((len(masks), num_words), 0xFFFFFFFF, dtype=np.uint32)
    for row, mask in enumerate(masks):
        if mask is not None:
            packed[row] = 0
            packed[row, : min(mask.size, num_words)] = mask.reshape(-1)[:num_words]
    return unpack(mx.array(packed), vocab_size)
