"""Top-k, top-p and min-p as one threshold per row: what is at or above it can be drawn.

A threshold is a value, so tokens that tie with the last kept one are kept too. transformers does the same in top-k and
min-p; in top-p it keeps as many of the tied ones as the order of its sort says.
"""

from __future__ import annotations

import math

import mlx.core as mx

MINUS_INFINITY = float("-inf")


def top_k_threshold(scores: mx.array, top_k: mx.array, max_top_k: int) -> mx.array:
    """The k-th largest score of each row, without sorting the vocabulary.

    Args:
        scores: (B, V) float32.
        top_k: (B,) int32, each at most `max_top_k`; 0 keeps all tokens of that row.
        max_top_k: the largest entry of `top_k`, from 1 to V; it fixes the shapes of the graph.

    Returns:
        (B, 1) float32, minus infinity where `top_k` is 0.
    """
    chunks, leading = leading_chunks(scores, max_top_k)
    candidates = mx.take_along_axis(chunks, leading[..., None], axis=1).flatten(1)
    return kth_largest(mx.sort(candidates, axis=-1), top_k)


def top_k_top_p_threshold(scores: mx.array, top_k: mx.array | None, tail: mx.array) -> mx.array:
    """The larger of the top-k and the top-p threshold of each row, from one sort.

    Top-p reads the distribution that top-k left over, as transformers' chain of warpers does: it drops the least likely
    tokens while their probabilities sum to at most 1 - top_p, and never the likeliest.

    Args:
        scores: (B, V) float32 with at least one finite entry a row.
        top_k: (B,) int32, 0 where a row keeps all; None where no row uses top-k.
        tail: (B,) float32, 1 - top_p; 0 where a row does not use top-p.

    Returns:
        (B, 1) float32.
    """
    ordered = mx.sort(scores, axis=-1)
    floor = mx.array(MINUS_INFINITY)
    if top_k is not None:
        floor = kth_largest(ordered, top_k)
        ordered = mx.where(ordered >= floor, ordered, MINUS_INFINITY)
    tail = tail[:, None]
    cumulative = mx.cumsum(mx.softmax(ordered, axis=-1), axis=-1)
    num_dropped = (cumulative <= tail).sum(axis=-1, keepdims=True)
    first_kept = mx.minimum(num_dropped, ordered.shape[-1] - 1)
    threshold = mx.take_along_axis(ordered, first_kept, axis=-1)
    # A row without top-p is left out: 0 as its tail would still drop tokens whose probability underflows.
    return mx.maximum(floor, mx.where(tail > 0, threshold, MINUS_INFINITY))


def min_p_threshold(scores: mx.array, log_min_p: mx.array) -> mx.array:
    """The score of a token that is `min_p` times as likely as the likeliest one.

    Args:
        scores: (B, V) float32.
        log_min_p: (B,) float32, natural logarithm of min_p, minus infinity where a row does not use it.

    Returns:
        (B, 1) float32.
    """
    return scores.max(axis=-1, keepdims=True) + log_min_p[:, None]


def kth_largest(ordered: mx.array, top_k: mx.array) -> mx.array:
    """Entry k from the end of each ascending row: (B, N), (B,) -> (B, 1), minus infinity where k is 0."""
    k = top_k[:, None]
    position = mx.clip(ordered.shape[-1] - k, 0, ordered.shape[-1] - 1)
    return mx.where(k > 0, mx.take_along_axis(ordered, position, axis=-1), MINUS_INFINITY)


def leading_chunks(scores: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The chunks of the vocabulary in which the `count` largest scores of each row stand.

    At most `count` chunks can hold them, and they are those with the largest maxima: so the vocabulary is only reduced,
    and sorts see some thousand values (MLX's partition on a GPU is a full sort).

    Args:
        scores: (B, V) float.
        count: from 1 to V.

    Returns:
        chunks (B, C, W), consecutive ids in each, padded with minus infinity; and the chosen chunks (B, at most count),
        best first, the lower id first among equal maxima.
    """
    num_rows, vocab_size = scores.shape
    width = chunk_width(vocab_size, count)
    padding = -vocab_size % width
    if padding:
        scores = mx.pad(scores, [(0, 0), (0, padding)], constant_values=mx.array(MINUS_INFINITY, dtype=scores.dtype))
    chunks = scores.reshape(num_rows, -1, width)  # (B, C, W)
    return chunks, mx.argsort(-chunks.max(axis=-1), axis=-1)[:, :count]


def chunk_width(vocab_size: int, count: int) -> int:
    """The power of two that makes V / W maxima and count * W candidates about equally many."""
    return 1 << int(math.log2(math.sqrt(vocab_size / count)))
