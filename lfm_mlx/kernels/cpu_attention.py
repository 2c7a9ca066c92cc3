"""Attention of prompts on the CPU, with numpy's products and exponentials.

MLX's wheel for Linux multiplies with a plain BLAS and takes exponentials one by one. numpy's wheel brings vectorised
ones: fifteen to twenty times as fast for a prompt on a long context. The softmax is computed online, as in
`lfm_mlx.kernels.chunked_attention`, in one buffer of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from lfm_mlx.kernels.chunked_attention import SCORE_BYTES, SpanLike, chunk_columns

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]

BLOCK_QUERIES = 256
"""Most queries of a row that go over the columns together."""

MAX_COLUMNS = 4096
"""Most columns that exist in float32 at once."""

MIN_SCORES = 4096
"""Fewer scores of a prompt are not worth waiting for what is queued."""

Columns = Callable[[int, int, int], tuple[mx.array, mx.array]]
"""A row and a range of columns -> its keys and values, float32 ``(G, columns, P)`` each."""


def is_for_cpu(queries: mx.array, span: SpanLike) -> bool:
    """Whether `attend_on_cpu` is the better way on this device: for prompts, and where MLX would need much memory.

    MLX's CPU backend has no fused attention, and would hold all scores at once.

    Args:
        queries: ``(B, H, L, P)``.
        span: where they stand.
    """
    B, H, L, P = queries.shape
    end = max(span.starts) + L
    # Where the context is shorter than the model is wide, attention is a small part of a layer.
    fewest = MIN_SCORES if L > 1 and end > H * P else SCORE_BYTES // 4
    return B * H * L * end > fewest and mx.default_device().type == mx.cpu


def attend_on_cpu(queries: mx.array, num_kv_heads: int, columns: Columns, span: SpanLike, scale: float) -> mx.array:
    """Causal attention in float32, evaluated: it cannot be traced.

    Args:
        queries: ``(B, H, L, P)``.
        num_kv_heads: G; each serves H / G query heads.
        columns: reads keys and values.
        span: where the L queries stand; each sees the columns up to its own.
        scale: factor on the scores.

    Returns:
        ``(B, H, L, P)`` in the queries' dtype.
    """
    import numpy as np  # Not with the package: it takes a tenth of a second and 11 MB.

    B, H, L, P = queries.shape
    scaled = np.asarray(queries.astype(mx.float32) * scale)
    attended = np.empty((B, H, L, P), dtype=np.float32)
    for row in range(B):
        for first in range(0, L, BLOCK_QUERIES):
            block = scaled[row, :, first : first + BLOCK_QUERIES]
            num_queries = block.shape[1]
            heads = block.reshape(num_kv_heads, -1, P)
            out = _attend_row(heads, num_queries, columns, row, span.starts[row] + first)
            attended[row, :, first : first + num_queries] = out.reshape(H, num_queries, P)
    return mx.array(attended).astype(queries.dtype)


def _attend_row(heads: Floats, num_queries: int, columns: Columns, row: int, position: int) -> Floats:
    """Queries ``(G, R, P)``, `num_queries` from `position` on for each of R / `num_queries` heads."""
    import numpy as np

    G, R, _ = heads.shape
    end = position + num_queries
    size = min(chunk_columns(1, G * R // num_queries, num_queries), MAX_COLUMNS, end)
    buffer = np.empty(G * R * size, dtype=np.float32)
    highest = np.full((G, R, 1), np.finfo(np.float32).min, dtype=np.float32)
    total = np.zeros_like(highest)
    summed: Floats = np.zeros_like(heads)
    for start in range(0, end, size):
        stop = min(start + size, end)
        keys, values = (np.asarray(part) for part in columns(row, start, stop))
        scores = buffer[: G * R * (stop - start)].reshape(G, R, stop - start)
        np.matmul(heads, keys.swapaxes(-1, -2), out=scores)
        if stop > position + 1:
            hidden = np.arange(start, stop) > np.arange(position, end)[:, None]
            # A finite floor: a query that sees nothing of a chunk must not turn into NaN.
            np.copyto(scores.reshape(G, -1, num_queries, stop - start), np.finfo(np.float32).min, where=hidden)
        raised = np.maximum(highest, scores.max(axis=-1, keepdims=True))
        decay = np.exp(highest - raised)
        scores -= raised
        np.exp(scores, out=scores)
        total = total * decay + scores.sum(axis=-1, keepdims=True)
        summed = summed * decay + scores @ values
        highest = raised
    summed /= total
    return summed
