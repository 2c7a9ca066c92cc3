"""Keys and values as the layer computes them."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.cache.attention_cache import AttentionCache
from lfm_mlx.cache.span import Span
from lfm_mlx.kernels import attend_on_cpu, is_for_cpu


class KVCache(AttentionCache):
    """Keys and values ``(B, G, capacity, P)`` in the activations' dtype."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        super().__init__((keys, values))

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
        if is_for_cpu(queries, span):
            return attend_on_cpu(queries, keys.shape[1], self._columns, span, scale)
        all_keys, all_values = self.arrays
        seen = span.seen
        return mx.fast.scaled_dot_product_attention(
            queries, all_keys[seen], all_values[seen], scale=scale, mask=span.mask
        )

    def write(self, keys: mx.array, values: mx.array, span: Span) -> None:
        """Store keys and values ``(B, G, L, P)`` at the span's positions."""
        self.write_columns((keys, values), span)

    def _columns(self, row: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
        keys, values = (array[row, :, start:stop].astype(mx.float32) for array in self.arrays)
        return keys, values
