"""Queries, keys and values for tests of attention, and what MLX's own makes of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from lfm_mlx.cache import Span

NUM_HEADS, NUM_KV_HEADS, WIDTH = 6, 2, 16
SCALE = 0.25


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def operands(span: Span, *, loudness: float = 3.0) -> tuple[mx.array, mx.array, mx.array]:
    """Queries (B, H, L, P), keys and values (B, G, S, P) whose scores spread widely, so that each softmax is sharp."""
    batch_size = len(span.starts)
    queries = drawn(batch_size, NUM_HEADS, span.num_tokens, WIDTH, seed=0) * loudness
    keys, values = (drawn(batch_size, NUM_KV_HEADS, span.end, WIDTH, seed=seed) for seed in (1, 2))
    return queries, keys, values


def fused(queries: mx.array, keys: mx.array, values: mx.array, span: Span) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=span.mask)
