"""What an attention layer remembers: keys and values of every position, in one buffer that grows rarely."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.cache.span import Span

GROWTH_TOKENS = 256
"""Buffers are whole multiples of this many tokens."""


class KVCache:
    """Keys and values ``(B, G, capacity, P)``; row b is valid up to its length, which the owner keeps.

    Every row starts at column 0, so rows of unequal length need no padding on the left; what stands behind a row's
    length is overwritten before anything may look at it.
    """

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def empty(cls, batch_size: int, num_kv_heads: int, head_dim: int, dtype: mx.Dtype) -> KVCache:
        """A cache without capacity; the first write allocates."""
        shape = (batch_size, num_kv_heads, 0, head_dim)
        return cls(mx.zeros(shape, dtype=dtype), mx.zeros(shape, dtype=dtype))

    @property
    def capacity(self) -> int:
        """Tokens a row can hold before the buffer has to grow."""
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes held, unused capacity included."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens a row; grows by at least half, so that copying stays rare."""
        if num_tokens <= self.capacity:
            return
        wanted = max(num_tokens, self.capacity * 3 // 2)
        capacity = -(-wanted // GROWTH_TOKENS) * GROWTH_TOKENS
        self.keys = _grown(self.keys, capacity)
        self.values = _grown(self.values, capacity)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, span: Span, scale: float) -> mx.array:
        """Write the new keys and values, and attend to all that each query may see.

        Args:
            queries: ``(B, H, L, P)``.
            keys: ``(B, G, L, P)``, rotated.
            values: ``(B, G, L, P)``.
            span: where the L tokens stand.
            scale: factor on the scores.

        Returns:
            ``(B, H, L, P)``.
        """
        self.write(keys, values, span)
        seen = slice(0, span.end)
        return mx.fast.scaled_dot_product_attention(
            queries, self.keys[:, :, seen], self.values[:, :, seen], scale=scale, mask=span.mask
        )

    def write(self, keys: mx.array, values: mx.array, span: Span) -> None:
        """Store keys and values ``(B, G, L, P)`` at the span's positions."""
        self.reserve(span.end)
        if span.is_even:
            start, end = span.starts[0], span.end
            self.keys[:, :, start:end] = keys
            self.values[:, :, start:end] = values
        else:
            columns = mx.broadcast_to(span.columns[:, None, :, None], keys.shape)
            self.keys = mx.put_along_axis(self.keys, columns, keys, axis=2)
            self.values = mx.put_along_axis(self.values, columns, values, axis=2)

    def snapshot(self, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Copies of the first `num_tokens` columns, evaluated."""
        copies = (mx.contiguous(self.keys[:, :, :num_tokens]), mx.contiguous(self.values[:, :, :num_tokens]))
        mx.eval(copies)
        return copies

    def restore(self, stored: tuple[mx.array, mx.array]) -> None:
        """Go back to what `snapshot` returned; the copy stays usable."""
        self.keys, self.values = stored

    def keep(self, rows: mx.array) -> None:
        """Keep only these rows of the batch, in this order; `rows` holds int32 indices."""
        self.keys = self.keys[rows]
        self.values = self.values[rows]

    def join(self, other: KVCache) -> None:
        """Append the rows of another batch, padding the shorter buffer."""
        capacity = max(self.capacity, other.capacity)
        self.keys = mx.concatenate([_grown(self.keys, capacity), _grown(other.keys, capacity)])
        self.values = mx.concatenate([_grown(self.values, capacity), _grown(other.values, capacity)])

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Every array held; all of them are to be evaluated on every step."""
        return (self.keys, self.values)


def _grown(buffer: mx.array, capacity: int) -> mx.array:
    batch_size, num_heads, used, width = buffer.shape
    if used == capacity:
        return buffer
    spare = mx.zeros((batch_size, num_heads, capacity - used, width), dtype=buffer.dtype)
    return mx.concatenate([buffer, spare], axis=2)
