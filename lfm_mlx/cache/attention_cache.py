"""What all caches of attention layers share: buffers ``(B, G, capacity, width)`` that grow rarely."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.cache.span import Span

GROWTH_TOKENS = 256
"""Buffers are whole multiples of this many tokens."""


class AttentionCache(ABC):
    """The columns of every position a layer has seen; row b is valid up to its length, which the owner keeps.

    Every row starts at column 0, so rows of unequal length need no padding on the left; what stands behind a row's
    length is overwritten before anything may look at it.

    Attributes:
        arrays: the buffers, each ``(B, G, capacity, width)``; all of them are to be evaluated on every step.
        planned_len: tokens that no row is meant to exceed; growing ahead stops there. None: nobody knows.
    """

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self.arrays = tuple(arrays)
        self.planned_len: int | None = None

    @abstractmethod
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

    @property
    def capacity(self) -> int:
        """Tokens a row can hold before the buffers have to grow."""
        return self.arrays[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes held, unused capacity included."""
        return sum(array.nbytes for array in self.arrays)

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens a row; grows by at least half, so that copying stays rare."""
        if num_tokens > self.capacity:
            ahead = self.capacity * 3 // 2
            wanted = max(num_tokens, ahead if self.planned_len is None else min(ahead, self.planned_len))
            self._grow(-(-wanted // GROWTH_TOKENS) * GROWTH_TOKENS)

    def write_columns(self, new: Sequence[mx.array], span: Span) -> None:
        """Store arrays ``(B, G, L, width)``, one a buffer, at the span's positions."""
        if span.end > self.arrays[0].shape[2]:
            self.reserve(span.end)
        if span.is_even:
            place = span.place
            for buffer, columns in zip(self.arrays, new, strict=True):
                buffer[place] = columns
            return
        pairs = zip(self.arrays, new, strict=True)
        self.arrays = tuple(mx.put_along_axis(a, span.column_index(b.shape), b, axis=2) for a, b in pairs)

    def snapshot(self, num_tokens: int) -> tuple[mx.array, ...]:
        """Copies of the first `num_tokens` columns, evaluated."""
        copies = tuple(mx.contiguous(array[:, :, :num_tokens]) for array in self.arrays)
        mx.eval(copies)
        return copies

    def restore(self, stored: tuple[mx.array, ...]) -> None:
        """Go back to what `snapshot` returned; the copy stays usable."""
        # New handles: writing in place would otherwise change what the snapshot holds.
        self.arrays = tuple(array[:] for array in stored)

    def fill(self, columns: Sequence[Sequence[mx.array]]) -> None:
        """Begin with these columns of one row in place of what is there; room that was reserved stays.

        Args:
            columns: for each buffer arrays ``(1, G, n, width)`` that follow each other.
        """
        num_tokens = sum(array.shape[2] for array in columns[0])
        capacity = max(self.capacity, -(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS)
        filled = []
        for arrays in columns:
            _, num_heads, _, width = arrays[0].shape
            spare = mx.zeros((1, num_heads, capacity - num_tokens, width), dtype=arrays[0].dtype)
            filled.append(mx.concatenate([*arrays, spare], axis=2))
        self.arrays = tuple(filled)

    def keep(self, rows: mx.array, capacity: int | None = None) -> None:
        """Keep only these rows of the batch, in this order; `rows` holds int32 indices.

        Args:
            rows: the rows.
            capacity: tokens a row has room for afterwards, where that is less than now.
        """
        self.arrays = tuple(array[:, :, :capacity][rows] for array in self.arrays)

    def join(self, other: AttentionCache) -> None:
        """Append the rows of another batch, padding the shorter buffers."""
        capacity = max(self.capacity, other.capacity)
        pairs = zip(self.arrays, other.arrays, strict=True)
        self.arrays = tuple(mx.concatenate([_grown(a, capacity), _grown(b, capacity)]) for a, b in pairs)

    def _grow(self, capacity: int) -> None:
        self.arrays = tuple(_grown(array, capacity) for array in self.arrays)


def _grown(buffer: mx.array, capacity: int) -> mx.array:
    batch_size, num_heads, used, width = buffer.shape
    if used == capacity:
        return buffer
    spare = mx.zeros((batch_size, num_heads, capacity - used, width), dtype=buffer.dtype)
    return mx.concatenate([buffer, spare], axis=2) if used else spare
