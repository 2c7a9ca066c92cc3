"""Working memory of one prompt chunk behind a long context: a layer of each kind, and the head.

Layers run one after another, so the most that any of them needs is what a whole chunk needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import mlx.core as mx

from lfm_mlx.cache import AttentionCache, KVCache, QuantizedKVCache, Span, State
from lfm_mlx.distributed import is_first_rank
from lfm_mlx.memory import release_freed
from lfm_mlx.model import Model, MoE

FILLED_COLUMNS = 1024
"""Columns of random keys and values that are made at once."""


def fill_with_random(state: State, num_tokens: int) -> None:
    """Put random keys and values into the first `num_tokens` columns of every row; lengths stay."""
    for layer in state.layers:
        if isinstance(layer, KVCache | QuantizedKVCache):
            B, G, _, _ = layer.arrays[0].shape
            P = head_dim_of(layer)
            for start in range(0, num_tokens, FILLED_COLUMNS):
                L = min(FILLED_COLUMNS, num_tokens - start)
                keys, values = (mx.random.normal((B, G, L, P), dtype=_dtype_of(layer)) for _ in range(2))
                layer.write(keys, values, Span.make([start] * B, L))
                mx.eval(layer.arrays)


def head_dim_of(cache: KVCache | QuantizedKVCache) -> int:
    """P of what `cache` holds."""
    width = cache.arrays[0].shape[-1]
    return width * 32 // cache.bits if isinstance(cache, QuantizedKVCache) else width


def _dtype_of(cache: AttentionCache) -> mx.Dtype:
    return mx.float32 if isinstance(cache, QuantizedKVCache) else cache.arrays[0].dtype


def chunk_transients(model: Model, state: State, num_tokens: int) -> Iterator[tuple[str, int]]:
    """The bytes that a chunk of `num_tokens` tokens a row needs beside weights and state, kind by kind.

    Args:
        model: any.
        state: of the model; the chunk takes the place of its last tokens, and its lengths stay.
        num_tokens: at most the tokens that the shortest row has.

    Yields:
        What was computed, such as "attention, experts", and the bytes. Attention comes last, as it takes longest.
    """
    lengths = tuple(length - num_tokens for length in state.lengths)
    tokens = mx.random.randint(
        0, model.config.vocab_size, (state.batch_size, num_tokens), key=mx.random.key(num_tokens)
    )
    mx.eval(tokens)
    for kind, layer in _one_of_each(model).items():
        alone = Model(
            config=model.config,
            embed_tokens=model.embed_tokens,
            layers=[model.layers[layer]],
            embedding_norm=model.embedding_norm,
            lm_head=None,
            dtype=model.dtype,
        )
        before = State([state.layers[layer]], lengths, state.max_context)
        if is_first_rank():
            click.echo(f"  computing {num_tokens:,} tokens in one layer: {kind}", err=True)
        release_freed()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(alone.hidden(tokens, before), before.arrays)
        yield kind, mx.get_peak_memory() - held
    hidden = mx.zeros((state.batch_size, model.config.hidden_size), dtype=model.dtype)
    mx.eval(hidden)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.head(hidden))
    yield "head", mx.get_peak_memory() - held


def _one_of_each(model: Model) -> dict[str, int]:
    """A layer of each combination of operator and feed-forward part that the model has; attention last."""
    found: dict[str, int] = {}
    for i, layer in enumerate(model.layers):
        operator = "convolution" if model.config.layer_types[i] == "conv" else "attention"
        feed_forward = "experts" if isinstance(layer.feed_forward, MoE) else "dense"
        found.setdefault(f"{operator}, {feed_forward}", i)
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("attention")))
