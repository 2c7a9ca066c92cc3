"""Attention in column chunks gives what fused attention gives, in memory that the context does not change."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attention_operands import SCALE, WIDTH, drawn, fused, operands
from random_models import relative_error

from lfm_mlx.cache import Span
from lfm_mlx.kernels import chunked_attention
from lfm_mlx.kernels.chunked_attention import MAX_CHUNK_COLUMNS, MIN_CHUNK_COLUMNS, attend_in_chunks, chunk_columns

TOLERANCE = 1e-5
BROKEN = 100 * TOLERANCE

CASES = {
    "prefill": ((0,), 300),
    "prefill of equal rows": ((0, 0), 150),
    "later chunk": ((333,), 70),
    "later chunk of equal rows": ((100, 100, 100), 33),
    "later chunk of unequal rows": ((5, 260, 131), 40),
    "decode": ((500,), 1),
    "decode of equal rows": ((200, 200), 1),
    "decode of unequal rows": ((300, 0, 64), 1),
    "exactly one chunk": ((MIN_CHUNK_COLUMNS - 1,), 1),
    "exactly two chunks": ((0,), 2 * MIN_CHUNK_COLUMNS),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the fewest columns, and blocks of 40 queries."""
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", 1)
    monkeypatch.setattr(chunked_attention, "BLOCK_QUERIES", 40)


@pytest.fixture(params=CASES)
def span(request: pytest.FixtureRequest) -> Span:
    return Span.make(*CASES[request.param])


Attend = Callable[..., mx.array]


def chunked(
    queries: mx.array, keys: mx.array, values: mx.array, span: Span, attend: Attend = attend_in_chunks
) -> mx.array:
    return attend(
        queries,
        keys.shape[1],
        lambda rows, start, stop: rows @ keys[:, :, start:stop].swapaxes(-1, -2),
        lambda weights, start, stop: weights @ values[:, :, start:stop],
        span,
        SCALE,
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("loudness", [0.0, 3.0, 100.0], ids=["equal weights", "sharp", "one-hot"])
def test_chunks_give_what_fused_attention_gives(span, loudness):
    inputs = operands(span, loudness=loudness)
    found = chunked(*inputs, span)
    assert found.dtype == mx.float32
    assert relative_error(found, fused(*inputs, span)) < TOLERANCE


@pytest.mark.parametrize("budget", [1, 10_000, 100_000, 64 << 20])
def test_the_size_of_chunks_does_not_change_the_result(monkeypatch, budget):
    span = Span.make((5, 260, 131), 40)
    inputs = operands(span)
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", budget)
    assert relative_error(chunked(*inputs, span), fused(*inputs, span)) < TOLERANCE


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_sixteen_bits_are_rounded_once_at_the_end(dtype):
    span = Span.make((5, 260), 40)
    queries, keys, values = operands(span)
    found = chunked(queries.astype(dtype), keys, values, span)
    assert found.dtype == dtype
    exact = fused(queries.astype(dtype).astype(mx.float32), keys, values, span)
    assert relative_error(found.astype(mx.float32), exact) <= mx.finfo(dtype).eps / 2 + TOLERANCE


@pytest.mark.usefixtures("small_chunks")
def test_what_stands_behind_a_rows_length_is_not_looked_at(span):
    queries, keys, values = operands(span)
    expected = chunked(queries, keys, values, span)
    columns, ends = np.arange(span.end), np.array(span.starts) + span.num_tokens
    is_behind = mx.array(columns >= ends[:, None])[:, None, :, None]  # (B, 1, S, 1)
    found = chunked(queries, mx.where(is_behind, 50.0, keys), mx.where(is_behind, 1e6, values), span)
    assert mx.array_equal(found, expected)


# What must fail.


def mutant(*, old: str, new: str) -> Attend:
    """`attend_in_chunks` with one piece of the source exchanged."""
    source = inspect.getsource(chunked_attention._attend_block) + inspect.getsource(attend_in_chunks)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in attend_in_chunks"
    names: dict[str, Any] = dict(vars(chunked_attention))
    exec("from __future__ import annotations\n" + source.replace(old, new), names)
    return names["attend_in_chunks"]


EVERYTHING = ["prefill", "later chunk of unequal rows", "decode of unequal rows"]
MUTANTS = {
    "the mask is dropped": ("scores = _masked(scores, positions, L, start, stop)", "pass", EVERYTHING),
    "a chunk counts its columns from 0": (
        "positions, L, start, stop",
        "positions, L, 0, stop - start",
        EVERYTHING,
    ),
    "what only the longest row may see is not masked": (
        "min(starts) + 1",
        "max(starts) + 1",
        ["later chunk of unequal rows", "decode of unequal rows"],
    ),
    "the sum of values is not rescaled": ("summed = summed * decay", "summed = summed", ["prefill", "decode"]),
    "the sum of weights is not rescaled": ("total = total * decay", "total = total", ["prefill", "decode"]),
    "what is rescaled is the new chunk": (
        "summed * decay + weigh(weights, start, stop)",
        "summed + decay * weigh(weights, start, stop)",
        ["prefill", "decode"],
    ),
    "the maximum of an earlier chunk stays": ("        highest = raised\n", "", ["prefill", "decode"]),
    "the first chunk's values serve all": (
        "summed * decay + weigh(weights, start, stop)",
        "summed * decay + weigh(weights, 0, stop - start)",
        ["prefill", "decode"],
    ),
    "the scale is left out": (", P) * scale", ", P)", EVERYTHING),
    "every block of queries stands where the first does": ("start + first", "start", ["prefill", "later chunk"]),
    "every block of queries has the first one's positions": (
        "span.columns[:, first : first + BLOCK_QUERIES]",
        "span.columns[:, :block.shape[2]]",
        ["prefill", "later chunk"],
    ),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("change", "case"), [(name, case) for name, (*_, cases) in MUTANTS.items() for case in cases])
def test_control_a_broken_attention_is_noticed(change, case):
    old, new, _ = MUTANTS[change]
    span = Span.make(*CASES[case])
    inputs = operands(span)
    assert relative_error(chunked(*inputs, span, mutant(old=old, new=new)), fused(*inputs, span)) > BROKEN


def test_control_a_source_that_is_not_changed_is_not_noticed(small_chunks, span):
    inputs = operands(span)
    same = mutant(old="highest = raised", new="highest = raised")
    assert relative_error(chunked(*inputs, span, same), fused(*inputs, span)) < TOLERANCE


# Memory.


@pytest.mark.parametrize(
    ("batch_size", "num_heads", "num_tokens"), list(itertools.product([1, 4], [8, 32], [1, 100, 2048]))
)
def test_a_chunk_is_as_wide_as_the_budget_allows_and_within_its_bounds(batch_size, num_heads, num_tokens):
    columns, column_bytes = chunk_columns(batch_size, num_heads, num_tokens), batch_size * num_heads * num_tokens * 4
    assert MIN_CHUNK_COLUMNS <= columns <= MAX_CHUNK_COLUMNS
    assert columns * column_bytes <= chunked_attention.SCORE_BYTES or columns == MIN_CHUNK_COLUMNS
    assert (columns + 1) * column_bytes > chunked_attention.SCORE_BYTES or columns == MAX_CHUNK_COLUMNS


BUDGET = 256 << 10
MOST_LIVE = 16
"""Arrays of the size of a chunk's scores that may be alive at once: MLX computes a few operations ahead."""

NUM_QUERIES = 64


def peak_bytes(attend: Callable[..., mx.array], num_columns: int) -> int:
    """Most bytes that 64 queries of 4 heads of width 16 take at the end of a long row, beside keys and values."""
    queries = drawn(1, 4, NUM_QUERIES, WIDTH, seed=0)
    keys, values = (drawn(1, 2, num_columns, WIDTH, seed=seed).astype(mx.bfloat16) for seed in (1, 2))
    span = Span.make((num_columns - NUM_QUERIES,), NUM_QUERIES)
    mx.eval(queries, keys, values, span.columns)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(queries, keys, values, span))
    return mx.get_peak_memory() - before


def in_chunks_of_float32(
    queries: mx.array, keys: mx.array, values: mx.array, span: Span, attend: Attend = attend_in_chunks
) -> mx.array:
    return attend(
        queries,
        keys.shape[1],
        lambda rows, start, stop: rows @ keys[:, :, start:stop].astype(mx.float32).swapaxes(-1, -2),
        lambda weights, start, stop: weights @ values[:, :, start:stop].astype(mx.float32),
        span,
        SCALE,
    )


@pytest.mark.parametrize("num_columns", [8_192, 32_768])
def test_attention_takes_no_more_memory_for_a_longer_context(monkeypatch, num_columns):
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", BUDGET)
    assert peak_bytes(in_chunks_of_float32, num_columns) < MOST_LIVE * BUDGET


def test_control_one_chunk_of_everything_takes_more_memory(monkeypatch):
    assert peak_bytes(in_chunks_of_float32, 32_768) > MOST_LIVE * BUDGET


def test_control_chunks_that_do_not_wait_for_the_sum_of_weights_take_more_memory(monkeypatch):
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", BUDGET)
    hasty = mutant(old="[summed, total]", new="[summed]")
    assert peak_bytes(lambda *inputs: in_chunks_of_float32(*inputs, hasty), 32_768) > MOST_LIVE * BUDGET
