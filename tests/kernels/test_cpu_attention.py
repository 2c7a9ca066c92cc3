"""A prompt's attention by numpy gives what fused attention gives, in memory that the context does not change."""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from attention_operands import NUM_HEADS, SCALE, WIDTH, fused, operands
from random_models import relative_error

from lfm_mlx.cache import Span
from lfm_mlx.kernels import cpu_attention
from lfm_mlx.kernels.cpu_attention import MAX_COLUMNS, MIN_SCORES, SCORE_BYTES, attend_on_cpu, is_for_cpu

TOLERANCE = 1e-5
BROKEN = 100 * TOLERANCE

CASES = {
    "prompt": ((0,), 300),
    "prompts of equal rows": ((0, 0), 150),
    "later chunk": ((333,), 70),
    "later chunk of unequal rows": ((5, 260, 131), 40),
    "one token": ((500,), 1),
    "one token of unequal rows": ((300, 0, 64), 1),
}

Attend = Callable[..., mx.array]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 columns, and blocks of 40 queries."""
    monkeypatch.setattr(cpu_attention, "MAX_COLUMNS", 64)
    monkeypatch.setattr(cpu_attention, "BLOCK_QUERIES", 40)


@pytest.fixture(params=CASES)
def span(request: pytest.FixtureRequest) -> Span:
    return Span.make(*CASES[request.param])


def by_numpy(
    queries: mx.array, keys: mx.array, values: mx.array, span: Span, attend: Attend = attend_on_cpu
) -> mx.array:
    def columns(row: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
        return keys[row, :, start:stop].astype(mx.float32), values[row, :, start:stop].astype(mx.float32)

    return attend(queries, keys.shape[1], columns, span, SCALE)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("loudness", [0.0, 3.0, 30.0], ids=["equal weights", "sharp", "one-hot"])
def test_it_gives_what_fused_attention_gives(span, loudness):
    inputs = operands(span, loudness=loudness)
    found = by_numpy(*inputs, span)
    assert found.dtype == mx.float32
    assert relative_error(found, fused(*inputs, span)) < TOLERANCE


def test_whole_chunks_give_what_fused_attention_gives(span):
    inputs = operands(span)
    assert relative_error(by_numpy(*inputs, span), fused(*inputs, span)) < TOLERANCE


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_sixteen_bits_are_rounded_once_at_the_end(dtype):
    span = Span.make((5, 260), 40)
    queries, keys, values = operands(span)
    found = by_numpy(queries.astype(dtype), keys, values, span)
    assert found.dtype == dtype
    exact = fused(queries.astype(dtype).astype(mx.float32), keys, values, span)
    assert relative_error(found.astype(mx.float32), exact) <= mx.finfo(dtype).eps / 2 + TOLERANCE


@pytest.mark.usefixtures("small_chunks")
def test_what_stands_behind_a_rows_length_is_not_looked_at(span):
    queries, keys, values = operands(span)
    expected = by_numpy(queries, keys, values, span)
    columns, ends = np.arange(span.end), np.array(span.starts) + span.num_tokens
    is_behind = mx.array(columns >= ends[:, None])[:, None, :, None]  # (B, 1, S, 1)
    found = by_numpy(queries, mx.where(is_behind, 50.0, keys), mx.where(is_behind, 1e6, values), span)
    assert mx.array_equal(found, expected)


@pytest.mark.usefixtures("small_chunks")
def test_a_row_does_not_depend_on_its_neighbours_to_the_last_bit():
    span = Span.make((5, 260, 131), 40)
    queries, keys, values = operands(span)
    together = by_numpy(queries, keys, values, span)
    for row, start in enumerate(span.starts):
        one = slice(row, row + 1)
        alone = by_numpy(queries[one], keys[one], values[one], Span.make((start,), 40))
        assert mx.array_equal(together[one], alone)


# What must fail.


def mutant(old: str, new: str) -> Attend:
    """`attend_on_cpu` with one piece of the source exchanged."""
    source = inspect.getsource(cpu_attention._attend_row) + inspect.getsource(attend_on_cpu)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times"
    names = dict(vars(cpu_attention))
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "mutant", "exec"), names)
    return names["attend_on_cpu"]


MUTANTS = {
    "the latest column is hidden": ("np.arange(start, stop) > np", "np.arange(start, stop) >= np"),
    "one column too many is seen": ("np.arange(position, end)[:, None]", "np.arange(position + 1, end + 1)[:, None]"),
    "nothing is hidden": ("if stop > position + 1", "if False"),
    "the sum is not rescaled": ("total * decay", "total"),
    "the weighted sum is not rescaled": ("summed * decay", "summed"),
    "a block does not know where it stands": ("span.starts[row] + first", "span.starts[row]"),
    "the first row's columns for all": ("columns(row, start, stop)", "columns(0, start, stop)"),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", MUTANTS)
def test_control_a_mistake_is_noticed(change):
    def worst(attend: Attend) -> float:
        spans = [Span.make(*CASES[name]) for name in ("prompt", "later chunk of unequal rows")]
        return max(
            relative_error(by_numpy(*operands(span), span, attend), fused(*operands(span), span)) for span in spans
        )

    assert worst(attend_on_cpu) < TOLERANCE
    assert worst(mutant(*MUTANTS[change])) > BROKEN


# What it takes.


def peak_bytes(num_columns: int) -> int:
    """Most bytes that numpy takes for 64 queries of 6 heads at the end of a long row."""
    span = Span.make((num_columns - 64,), 64)
    inputs = operands(span)
    mx.eval(inputs)
    tracemalloc.start()
    try:
        by_numpy(*inputs, span)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_context(monkeypatch):
    monkeypatch.setattr(cpu_attention, "MAX_COLUMNS", 512)
    score_bytes = NUM_HEADS * 64 * 512 * 4
    short, long = peak_bytes(2_048), peak_bytes(16_384)
    assert score_bytes < long < 2 * score_bytes
    assert long < short * 1.01


def test_control_wider_chunks_take_more(monkeypatch):
    monkeypatch.setattr(cpu_attention, "MAX_COLUMNS", 16_384)
    assert peak_bytes(16_384) > 4 * NUM_HEADS * 64 * 512 * 4


def test_it_is_for_prompts_on_long_contexts_and_for_scores_beyond_the_budget():
    def is_for(num_rows: int, num_tokens: int, start: int) -> bool:
        span = Span.make((start,) * num_rows, num_tokens)
        return is_for_cpu(mx.zeros((num_rows, NUM_HEADS, num_tokens, WIDTH)), span)

    is_on_cpu = mx.default_device().type == mx.cpu
    assert is_for(1, 64, MIN_SCORES) == is_on_cpu
    assert is_for(1, 2, MIN_SCORES) == is_on_cpu
    assert not is_for(1, 2, 10)
    assert not is_for(9, 64, NUM_HEADS * WIDTH - 64)
    assert is_for(9, 64, NUM_HEADS * WIDTH - 63) == is_on_cpu
    assert not is_for(1, 1, MAX_COLUMNS * 8)
    assert is_for(4, 1, SCORE_BYTES // 4 // NUM_HEADS) == is_on_cpu
