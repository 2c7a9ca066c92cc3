"""Where the tokens of one call stand in their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from lfm_mlx.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Span:
    """The stretch of tokens that one forward pass computes, row by row.

    Args:
        starts: position of the first new token of each row.
        counts: how many of the L tokens of each row are real; the rest is padding on the right.
        num_tokens: L, the padded number of tokens of this call.
        offsets: `starts` on the device, int32: a scalar when all rows start alike, else ``(B,)``.
        asked: tokens into this call, of a single row, after which the convolutions hand out what they remember.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    num_tokens: int
    offsets: mx.array
    asked: tuple[int, ...] = ()

    @classmethod
    def make(cls, starts: Sequence[int], num_tokens: int, counts: Sequence[int] | None = None) -> Span:
        """A span of `num_tokens` tokens a row, of which `counts` are real (all, when None).

        Raises:
            OptionError: a count is negative or larger than `num_tokens`, or there is not one a row.
        """
        if counts is None and len(starts) == 1:
            offset = mx.array(starts[0], dtype=mx.int32)
            return cls(starts=tuple(starts), counts=(num_tokens,), num_tokens=num_tokens, offsets=offset)
        taken = tuple(counts) if counts is not None else (num_tokens,) * len(starts)
        if len(taken) != len(starts) or any(not 0 <= count <= num_tokens for count in taken):
            raise OptionError(
                f"lengths is {list(taken)}, expected {len(starts)} whole numbers (one a row) from 0 to {num_tokens}"
            )
        is_even = len(set(starts)) == 1
        offsets = mx.array(starts[0] if is_even else list(starts), dtype=mx.int32)
        return cls(starts=tuple(starts), counts=taken, num_tokens=num_tokens, offsets=offsets)

    @cached_property
    def is_even(self) -> bool:
        """Whether all rows start at the same position."""
        return len(set(self.starts)) == 1

    @cached_property
    def is_padded(self) -> bool:
        """Whether some row has fewer real tokens than the call has."""
        return any(count != self.num_tokens for count in self.counts)

    @cached_property
    def end(self) -> int:
        """One past the last position that any row writes, padding included."""
        return max(self.starts) + self.num_tokens

    @cached_property
    def place(self) -> tuple[slice, slice, slice]:
        """The index of the new tokens in buffers ``(B, G, capacity, width)``, for even rows."""
        return slice(None), slice(None), slice(self.starts[0], self.end)

    @cached_property
    def seen(self) -> tuple[slice, slice, slice]:
        """The index of all tokens up to the new ones in buffers ``(B, G, capacity, width)``."""
        return slice(None), slice(None), slice(0, self.end)

    @property
    def ends(self) -> tuple[int, ...]:
        """Length of each row after this call."""
        return tuple(start + count for start, count in zip(self.starts, self.counts, strict=True))

    @cached_property
    def columns(self) -> mx.array:
        """Positions of the new tokens, int32 ``(B, L)``, or ``(1, L)`` when all rows start alike."""
        return self.offsets.reshape(-1, 1) + mx.arange(self.num_tokens, dtype=mx.int32)

    def column_index(self, shape: tuple[int, ...]) -> mx.array:
        """`columns` for every element of ``(B, G, L, width)`` arrays to be stored, the same array for equal shapes."""
        found = self._indices.get(shape)
        if found is None:
            found = self._indices[shape] = mx.broadcast_to(self.columns[:, None, :, None], shape)
        return found

    @cached_property
    def _indices(self) -> dict[tuple[int, ...], mx.array]:
        return {}

    @cached_property
    def mask(self) -> mx.array | str | None:
        """What attention may see: None for everything, "causal" for even rows, else bool ``(B, 1, L, S)``."""
        if self.is_even:
            return None if self.num_tokens == 1 else "causal"
        return (mx.arange(self.end, dtype=mx.int32) <= self.columns[..., None])[:, None]
