"""Keys and values as the layer computes them."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.cache.attention_cache import AttentionCache
from lfm_mlx.cache.span import Span
from lfm_mlx.kernels import SCORE_BYTES, attend_in_chunks

FLOAT32_COLUMNS = 4096
"""Columns that are cast to float32 at once where attention is computed in chunks."""


class KVCache(AttentionCache):
    """Keys and values ``(B, G, capacity, P)`` in the activations' dtype."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        super().__init__((keys, values))
        self._is_on_cpu = mx.default_device().type == mx.cpu
        self._head_dim = keys.shape[-1]

    @classmethod
    def empty(cls, batch_size: int, num_kv_heads: int, head_dim: int, dtype: mx.Dtype) -> KVCache:
        """A cache without capacity; the first write allocates."""
        shape = (batch_size, num_kv_heads, 0, head_dim)
        return cls(mx.zeros(shape, dtype=dtype), mx.zeros(shape, dtype=dtype))

    @property
    def keys(self) -> mx.array:
        """Rotated keys."""
        return self.arrays[0]

    @property
    def values(self) -> mx.array:
        """Values."""
        return self.arrays[1]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, span: Span, scale: float) -> mx.array:
        """As `AttentionCache.attend`."""
        self.write_columns((keys, values), span)
        if self._is_on_cpu and queries.size * span.end * 4 > SCORE_BYTES * self._head_dim:
            return self._attend_in_chunks(queries, keys.shape[1], span, scale)
        all_keys, all_values = self.arrays
        seen = span.seen
        return mx.fast.scaled_dot_product_attention(
            queries, all_keys[seen], all_values[seen], scale=scale, mask=span.mask
        )

    def _attend_in_chunks(self, queries: mx.array, num_kv_heads: int, span: Span, scale: float) -> mx.array:
        """MLX's CPU backend has no fused attention: it would hold all scores at once."""
        return attend_in_chunks(
            queries,
            num_kv_heads,
            lambda rows, start, stop: rows @ self._columns(0, start, stop).swapaxes(-1, -2),
            lambda weights, start, stop: weights @ self._columns(1, start, stop),
            span,
            scale,
            max_columns=FLOAT32_COLUMNS,
        )

    def write(self, keys: mx.array, values: mx.array, span: Span) -> None:
        """Store keys and values ``(B, G, L, P)`` at the span's positions."""
        self.write_columns((keys, values), span)

    def _columns(self, which: int, start: int, stop: int) -> mx.array:
        return self.arrays[which][:, :, start:stop].astype(mx.float32)
