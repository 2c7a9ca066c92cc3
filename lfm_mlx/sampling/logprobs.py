"""Log-probabilities under the model's own distribution: before bias, penalties, temperature and truncation."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from lfm_mlx.sampling.truncation import leading_chunks


class TokenLogProbs(NamedTuple):
    """What the model thought of a token and of its best alternatives.

    Args:
        chosen: (B,) float32, of the drawn token.
        top_ids: (B, top) uint32, the likeliest tokens, best first, the lowest id first among equals.
        top_values: (B, top) float32, theirs.
    """

    chosen: mx.array
    top_ids: mx.array
    top_values: mx.array


def logprobs(logits: mx.array, ids: mx.array, top: int) -> TokenLogProbs:
    """Natural log-probabilities of the drawn tokens and of the `top` likeliest ones.

    Args:
        logits: (B, V), any float type; taken to float32 first.
        ids: (B,) drawn tokens.
        top: how many alternatives, from 0 to V; it fixes the shapes of the graph.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, ids[:, None], axis=-1) - total
    if top == 0:
        empty = mx.zeros((logits.shape[0], 0))
        return TokenLogProbs(chosen[:, 0], empty.astype(mx.uint32), empty)
    top_ids = largest_ids(logits, top)
    top_values = mx.take_along_axis(logits, top_ids, axis=-1) - total
    return TokenLogProbs(chosen[:, 0], top_ids, top_values)


def largest_ids(scores: mx.array, count: int) -> mx.array:
    """The ids of the `count` largest scores, best first, the lowest id first among equals: (B, count) uint32."""
    chunks, leading = leading_chunks(scores, count)
    width = chunks.shape[-1]
    # In order of id again, so that the stable sort below breaks ties by id.
    leading = mx.sort(leading, axis=-1)[..., None]
    candidates = mx.take_along_axis(chunks, leading, axis=1).flatten(1)
    ids = (leading * width + mx.arange(width, dtype=mx.uint32)).flatten(1)
    order = mx.argsort(-candidates, axis=-1)[:, :count]
    return mx.take_along_axis(ids, order, axis=-1)
