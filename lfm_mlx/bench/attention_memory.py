"""How much memory does attention over quantised keys and values take beside them, and how exact is it?

The reference is attention in float64 with all scores at once, of some of the queries: over the columns as they are
stored, which shows what the chunks cost, and over the columns before they were quantised, which shows what bits cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from lfm_mlx.bench.machine import backend
from lfm_mlx.bench.memory_growth import resident_bytes
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.shapes import config_named
from lfm_mlx.bench.subject import LARGE_SHAPES
from lfm_mlx.cache import QuantizedKVCache, Span
from lfm_mlx.errors import OptionError
from lfm_mlx.terminal import format_bytes

COLUMNS, TOKENS = 131_072, 2048
CPU_COLUMNS, CPU_TOKENS = 8192, 256

PART_COLUMNS = 1024
"""Columns that are made, and read back, at once."""

HIDDEN_COLUMNS = 4
"""Columns that the control leaves out of each part."""

Floats = NDArray[np.float32]


def ask_attention_memory(
    *, shapes: str = LARGE_SHAPES, columns: int | None = None, num_tokens: int | None = None, kv_bits: int = 8
) -> Report:
    """Attend once, in one layer, with random queries, keys and values.

    Args:
        shapes: the geometry whose heads are taken.
        columns: keys and values that the last query sees.
        num_tokens: queries of each head, those of the last tokens; at most `columns`.
        kv_bits: 8 or 4.

    Raises:
        OptionError: more queries than columns, or bits that this geometry cannot have.
    """
    is_small = backend() == "cpu"
    S = columns or (CPU_COLUMNS if is_small else COLUMNS)
    L = num_tokens or min(CPU_TOKENS if is_small else TOKENS, S)
    if L > S:
        raise OptionError(f"tokens is {L}, expected at most the columns, {S}")
    config = config_named(shapes)
    H, G, P = config.num_heads, config.num_kv_heads, config.head_dim
    cache = QuantizedKVCache.empty(1, G, P, kv_bits)
    cache.reserve(S)
    for start, count in _parts(0, S - L):
        cache.write(*_columns(start, count, G, P), Span.make([start], count))
        mx.eval(cache.arrays)
    queries = mx.random.normal((1, H, L, P), key=mx.random.key(0))
    new = [_columns(start, count, G, P) for start, count in _parts(S - L, S)]
    keys, values = (mx.concatenate(list(parts), axis=2) for parts in zip(*new, strict=True))
    mx.eval(queries, keys, values)
    del new
    mx.clear_cache()
    mx.reset_peak_memory()
    held, resident = mx.get_active_memory(), resident_bytes()
    attended = cache.attend(queries, keys, values, Span.make([S - L], L), P**-0.5)
    mx.eval(attended)
    transient, resident = mx.get_peak_memory() - held, resident_bytes() - resident

    sampled = sorted({0, L // 3, L // 2, L - 1})
    got, asked = (np.array(array)[0][:, sampled].astype(np.float64) for array in (attended, queries))
    seen = [S - L + token + 1 for token in sampled]
    all_parts = [*_parts(0, S - L), *_parts(S - L, S)]
    made = [tuple(_host(array) for array in _columns(start, count, G, P)) for start, count in all_parts]
    bits_cost = _error(got, _unfused(asked, seen, made))
    made = [_stored(cache, start, count) for start, count in all_parts]
    chunks_cost = _error(got, _unfused(asked, seen, made))
    for stored_keys, _ in made:
        stored_keys[:, :HIDDEN_COLUMNS] = 0.0
    errors = {
        f"over the same {kv_bits}-bit columns": chunks_cost,
        "over the columns before they were quantised": bits_cost,
        f"control: {HIDDEN_COLUMNS} keys in {PART_COLUMNS:,} are zero": _error(got, _unfused(asked, seen, made)),
    }
    return Report(
        question="attention",
        parameters={"shapes": shapes, "columns": S, "tokens": L, "kv_bits": kv_bits},
        results={
            "cache_bytes": cache.num_bytes,
            "transient_bytes": transient,
            "resident_growth_bytes": resident,
            "score_bytes": H * L * S * 4,
            "relative_errors": errors,
        },
        title=f"Attention of {L:,} tokens over {S:,} columns of {kv_bits} bits, one layer of {shapes}",
        header=["", "bytes"],
        rows=[
            ["keys and values", format_bytes(cache.num_bytes)],
            ["beside them, arrays", format_bytes(transient)],
            ["beside them, growth of the process", format_bytes(max(resident, 0))],
            ["all scores at once would take", format_bytes(H * L * S * 4)],
            ["difference to float64, all scores at once", "relative"],
            *([f"  {name}", error] for name, error in errors.items()),
        ],
        notes=(f"difference: root mean square, of {len(sampled)} queries of each head.",),
    )


def _columns(start: int, count: int, num_heads: int, head_dim: int) -> tuple[mx.array, mx.array]:
    """Keys and values of some columns, ``(1, G, count, P)``: the same whenever they are asked for."""
    keys = mx.random.split(mx.random.key(1 + start), 2)
    made = [mx.random.normal((1, num_heads, count, head_dim), key=key) for key in keys]
    return made[0], made[1]


def _parts(start: int, stop: int) -> list[tuple[int, int]]:
    """First column and number of columns of each part."""
    return [(first, min(PART_COLUMNS, stop - first)) for first in range(start, stop, PART_COLUMNS)]


def _stored(cache: QuantizedKVCache, start: int, count: int) -> tuple[Floats, Floats]:
    """What the cache holds of some columns, unpacked, keys and values ``(G, count, P)``."""
    part = slice(start, start + count)
    unpacked = []
    for codes, scales, biases in (cache.keys, cache.values):
        columns = mx.dequantize(
            codes[:, :, part], scales[:, :, part], biases[:, :, part], group_size=cache.group_size, bits=cache.bits
        )
        unpacked.append(_host(columns))
    return unpacked[0], unpacked[1]


def _host(columns: mx.array) -> Floats:
    found: Floats = np.array(columns)[0]
    return found


def _unfused(queries: NDArray[np.float64], seen: Sequence[int], parts: Sequence[Sequence[Floats]]) -> Any:
    """Softmax over all scores at once, in float64.

    Args:
        queries: ``(H, n, P)``.
        seen: columns that each of the n queries sees.
        parts: keys and values ``(G, columns, P)`` that follow each other.

    Returns:
        ``(H, n, P)``.
    """
    H, n, P = queries.shape
    G = parts[0][0].shape[0]
    attended = np.zeros((H, n, P))
    for g in range(G):
        keys, values = (np.concatenate([part[which][g] for part in parts]).astype(np.float64) for which in (0, 1))
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for i, count in enumerate(seen):
                scores = keys[:count] @ queries[h, i] * P**-0.5
                weights = np.exp(scores - scores.max())
                attended[h, i] = weights @ values[:count] / weights.sum()
    return attended


def _error(got: Any, expected: Any) -> float:
    return float(np.sqrt(((got - expected) ** 2).sum() / (expected**2).sum()))
