"""Attention over a long memory in column chunks, so that no score matrix over all of it ever exists.

The softmax is computed online (Milakov & Gimelshein, arXiv:1805.02867; Rabe & Staats, arXiv:2112.05682): a running
maximum, a running sum, and a running weighted sum that is rescaled whenever the maximum grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

SCORE_BYTES = 16 << 20
"""Most bytes that the scores of one chunk take, whatever the context."""

BLOCK_QUERIES = 512
"""Most queries a row that go over the columns together. A chunk of columns can be the wider, and running sums are
rescaled the less often, the fewer queries there are; but every block reads all columns again."""

MAX_CHUNK_COLUMNS = 32_768
MIN_CHUNK_COLUMNS = 64


class SpanLike(Protocol):
    """What attention has to know of a `lfm_mlx.cache.Span`."""

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of each row's first query."""
        ...

    @property
    def columns(self) -> mx.array:
        """Positions of the queries, int32 ``(B, L)`` or ``(1, L)``."""
        ...


Score = Callable[[mx.array, int, int], mx.array]
"""Queries ``(B, G, R, P)`` and a range of columns -> scores ``(B, G, R, columns)``."""

Weigh = Callable[[mx.array, int, int], mx.array]
"""Weights ``(B, G, R, columns)`` and a range of columns -> weighted sums of values ``(B, G, R, P)``."""


def attend_in_chunks(
    queries: mx.array,
    num_kv_heads: int,
    score: Score,
    weigh: Weigh,
    span: SpanLike,
    scale: float,
) -> mx.array:
    """Causal attention in float32 over columns that only `score` and `weigh` know.

    Args:
        queries: ``(B, H, L, P)``.
        num_kv_heads: G; each serves H / G query heads.
        score: multiplies queries with keys.
        weigh: multiplies weights with values.
        span: where the L queries stand; each sees the columns up to its own.
        scale: factor on the scores.

    Returns:
        ``(B, H, L, P)`` in the queries' dtype.
    """
    done: list[mx.array] = []
    for first in range(0, queries.shape[2], BLOCK_QUERIES):
        block = queries[:, :, first : first + BLOCK_QUERIES]
        if done:
            # As for the chunks of a block, see there.
            (block,) = mx.depends([block], done[-1:])
        positions = span.columns[:, first : first + BLOCK_QUERIES]
        starts = [start + first for start in span.starts]
        done.append(_attend_block(block, num_kv_heads, score, weigh, positions, starts, scale))
    return mx.concatenate(done, axis=2) if len(done) > 1 else done[0]


def _attend_block(
    queries: mx.array,
    num_kv_heads: int,
    score: Score,
    weigh: Weigh,
    positions: mx.array,
    starts: Sequence[int],
    scale: float,
) -> mx.array:
    B, H, L, P = queries.shape
    rows = queries.astype(mx.float32).reshape(B, num_kv_heads, (H // num_kv_heads) * L, P) * scale
    size = chunk_columns(B, H, L)
    end = max(starts) + L
    highest = total = summed = None
    for start in range(0, end, size):
        stop = min(start + size, end)
        if summed is not None and total is not None:
            # Without this every chunk's scores and weights could be alive at once: nothing else orders the chunks.
            (rows,) = mx.depends([rows], [summed, total])
        scores = score(rows, start, stop)
        if stop > min(starts) + 1:
            scores = _masked(scores, positions, L, start, stop)
        largest = scores.max(axis=-1, keepdims=True)
        if highest is None or total is None or summed is None:
            highest = largest
            weights = mx.exp(scores - highest)
            total, summed = weights.sum(axis=-1, keepdims=True), weigh(weights, start, stop)
            continue
        raised = mx.maximum(highest, largest)
        weights, decay = mx.exp(scores - raised), mx.exp(highest - raised)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        summed = summed * decay + weigh(weights, start, stop)
        highest = raised
    assert summed is not None
    assert total is not None
    return (summed / total).reshape(B, H, L, P).astype(queries.dtype)


def chunk_columns(batch_size: int, num_heads: int, num_tokens: int) -> int:
    """Columns a chunk may have so that its float32 scores stay within `SCORE_BYTES`."""
    fitting = SCORE_BYTES // (batch_size * num_heads * num_tokens * 4)
    return max(MIN_CHUNK_COLUMNS, min(MAX_CHUNK_COLUMNS, fitting))


def _masked(scores: mx.array, positions: mx.array, num_tokens: int, start: int, stop: int) -> mx.array:
    B, G, R, S = scores.shape
    visible = mx.arange(start, stop, dtype=mx.int32) <= positions[..., None]  # (B, L, S)
    split = scores.reshape(B, G, R // num_tokens, num_tokens, S)
    # A finite floor: a row that sees nothing of a chunk must not turn into NaN.
    return mx.where(visible[:, None, None], split, mx.finfo(mx.float32).min).reshape(B, G, R, S)
