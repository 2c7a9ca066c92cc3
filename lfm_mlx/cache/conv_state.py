"""What a short convolution remembers: its gated inputs at the last W - 1 positions of each row."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.cache.span import Span


class ConvState:
    """The last W - 1 gated inputs of each row, oldest first, one array ``(B, 1, 1, D)`` a position.

    Separate arrays of the shape in which a decode step computes make its shift free: nothing is copied.

    Attributes:
        rows: the positions.
        handed_out: what was remembered at the K places that the latest span asked for, ``(K, W - 1, D)``, or None.
    """

    def __init__(self, rows: Sequence[mx.array]) -> None:
        self.rows: tuple[mx.array, ...] = tuple(rows)
        self.handed_out: mx.array | None = None

    @classmethod
    def zeros(cls, batch_size: int, num_rows: int, width: int, dtype: mx.Dtype) -> ConvState:
        """The state before the first token."""
        return cls([mx.zeros((batch_size, 1, 1, width), dtype=dtype) for _ in range(num_rows)])

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(row.nbytes for row in self.rows)

    def extend(self, inputs: mx.array, span: Span) -> mx.array:
        """Put the gated inputs of a call behind those remembered, and remember the latest.

        Args:
            inputs: ``(B, L, D)``.
            span: which of the L inputs of each row are real.

        Returns:
            ``(B, W - 1 + L, D)``: what the convolution has to see.
        """
        num_rows = len(self.rows)
        seen = mx.concatenate([*(row[:, 0] for row in self.rows), inputs], axis=1)
        if not span.is_padded:
            latest = [seen[:, span.num_tokens + i, None, None] for i in range(num_rows)]
        else:
            counts = mx.array(span.counts, dtype=mx.int32)[:, None, None]
            latest = [mx.take_along_axis(seen, counts + i, axis=1)[:, None] for i in range(num_rows)]
        # A slice would keep the whole chunk alive for as long as the row is remembered.
        self.rows = tuple(mx.contiguous(row) for row in latest)
        if span.asked:
            index = mx.array([place + i for place in span.asked for i in range(num_rows)], dtype=mx.int32)
            self.handed_out = seen[0, index].reshape(len(span.asked), num_rows, -1)
        return seen

    def snapshot(self) -> tuple[mx.array, ...]:
        """Copies of the rows, evaluated."""
        copies = tuple(row + 0 for row in self.rows)
        mx.eval(copies)
        return copies

    def restore(self, rows: tuple[mx.array, ...]) -> None:
        """Go back to what `snapshot` returned."""
        self.rows = rows

    def keep(self, rows: mx.array) -> None:
        """Keep only these rows of the batch, in this order; `rows` holds int32 indices."""
        self.rows = tuple(row[rows] for row in self.rows)

    def join(self, other: ConvState) -> None:
        """Append the rows of another batch."""
        self.rows = tuple(mx.concatenate([a, b]) for a, b in zip(self.rows, other.rows, strict=True))

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Every array held; all of them are to be evaluated on every step."""
        return self.rows
