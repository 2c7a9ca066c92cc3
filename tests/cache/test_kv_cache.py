"""Keys and values stand where they were written, whatever the buffer does."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from random_models import relative_error

from lfm_mlx.cache import KVCache, Span, kv_cache
from lfm_mlx.cache.attention_cache import GROWTH_TOKENS
from lfm_mlx.kernels import cpu_attention

HEADS, WIDTH = 2, 4


def random_keys(batch_size: int, num_tokens: int, seed: int = 0) -> mx.array:
    generator = np.random.default_rng(seed)
    return mx.array(generator.standard_normal((batch_size, HEADS, num_tokens, WIDTH)).astype(np.float32))


def write(cache: KVCache, keys: mx.array, starts: tuple[int, ...]) -> None:
    cache.write(keys, -keys, Span.make(starts, keys.shape[2]))


@pytest.mark.parametrize("sizes", [[1, 1, 1], [255, 1, 1], [256, 256, 1], [200, 200, 200], [1000]], ids=str)
def test_what_was_written_is_read_back_across_growth(sizes):
    cache, keys, done = KVCache.empty(2, HEADS, WIDTH, mx.float32), random_keys(2, sum(sizes)), 0
    for size in sizes:
        write(cache, keys[:, :, done : done + size], (done, done))
        done += size
    assert cache.capacity >= done
    assert cache.capacity % GROWTH_TOKENS == 0
    assert mx.array_equal(cache.keys[:, :, :done], keys)
    assert mx.array_equal(cache.values[:, :, :done], -keys)


def test_rows_of_unequal_length_are_written_at_their_own_ends():
    cache, first, second = KVCache.empty(2, HEADS, WIDTH, mx.float32), random_keys(2, 5), random_keys(2, 3, seed=1)
    write(cache, first, (0, 0))
    write(cache, second, (5, 2))
    assert mx.array_equal(cache.keys[0, :, :8], mx.concatenate([first[0], second[0]], axis=1))
    assert mx.array_equal(cache.keys[1, :, :5], mx.concatenate([first[1, :, :2], second[1]], axis=1))


def test_a_buffer_grows_by_at_least_half():
    cache = KVCache.empty(1, HEADS, WIDTH, mx.float32)
    capacities = []
    for num_tokens in range(1, 3000):
        cache.reserve(num_tokens)
        capacities.append(cache.capacity)
    grown = sorted(set(capacities))
    assert all(after >= before * 1.5 for before, after in itertools.pairwise(grown))


def attention_of(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int) -> np.ndarray:
    """Reference: one query (H, P) at `position` over keys and values (G, S, P)."""
    shared = queries.shape[0] // keys.shape[0]
    seen = slice(0, position + 1)
    out = []
    for head, query in enumerate(queries):
        scores = keys[head // shared, seen] @ query * 0.5
        weights = np.exp(scores - scores.max())
        out.append(weights @ values[head // shared, seen] / weights.sum())
    return np.stack(out)


@pytest.mark.parametrize("starts", [(4, 4), (4, 1)], ids=["even", "uneven"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_each_query_attends_to_its_own_row_up_to_itself(starts, num_tokens):
    cache = KVCache.empty(2, HEADS, WIDTH, mx.float32)
    write(cache, random_keys(2, 4), (0, 0))
    keys = random_keys(2, num_tokens, seed=1)
    queries = mx.concatenate([random_keys(2, num_tokens, seed=2), random_keys(2, num_tokens, seed=3)], axis=1)
    found = np.array(cache.attend(queries, keys, -keys, Span.make(starts, num_tokens), scale=0.5))
    for row, start in enumerate(starts):
        for i in range(num_tokens):
            reference = attention_of(
                np.array(queries)[row, :, i], np.array(cache.keys)[row], np.array(cache.values)[row], start + i
            )
            np.testing.assert_allclose(found[row, :, i], reference, rtol=1e-5, atol=1e-6)
            later = attention_of(
                np.array(queries)[row, :, i], np.array(cache.keys)[row], np.array(cache.values)[row], start + i - 1
            )
            assert np.abs(found[row, :, i] - later).max() > 1e-3


def test_a_snapshot_is_not_moved_by_what_follows_and_can_be_restored_twice():
    cache, keys = KVCache.empty(1, HEADS, WIDTH, mx.float32), random_keys(1, GROWTH_TOKENS)
    write(cache, keys, (0,))
    snapshot = cache.snapshot(GROWTH_TOKENS)
    for start in (0, 100):
        write(cache, random_keys(1, 10, seed=2), (start,))
        mx.eval(cache.arrays)
        assert not mx.array_equal(cache.keys[:, :, :GROWTH_TOKENS], keys)
        cache.restore(snapshot)
        assert mx.array_equal(cache.keys, keys)
        write(cache, random_keys(1, 10, seed=3), (GROWTH_TOKENS,))
        mx.eval(cache.arrays)
        assert mx.array_equal(snapshot[0], keys)


def test_writing_inside_a_restored_buffer_leaves_the_snapshot_alone():
    cache, keys = KVCache.empty(1, HEADS, WIDTH, mx.float32), random_keys(1, 8)
    write(cache, keys, (0,))
    snapshot = cache.snapshot(8)
    cache.restore(snapshot)
    write(cache, random_keys(1, 2, seed=2), (3,))
    mx.eval(cache.arrays)
    assert mx.array_equal(snapshot[0], keys)


def test_keep_and_join_move_whole_rows_and_pad_the_shorter_buffer():
    cache, keys = KVCache.empty(3, HEADS, WIDTH, mx.float32), random_keys(3, 5)
    write(cache, keys, (0, 0, 0))
    other, longer = KVCache.empty(1, HEADS, WIDTH, mx.float32), random_keys(1, 300, seed=1)
    write(other, longer, (0,))
    cache.keep(mx.array([2, 0]))
    cache.join(other)
    assert cache.capacity == other.capacity
    assert mx.array_equal(cache.keys[0, :, :5], keys[2])
    assert mx.array_equal(cache.values[1, :, :5], -keys[0])
    assert mx.array_equal(cache.keys[2, :, :300], longer[0])


def test_one_token_more_copies_nothing_but_that_token():
    """Donation: the buffer is updated in place while nobody else refers to it."""
    cache = KVCache.empty(1, HEADS, 4096, mx.float32)
    cache.reserve(GROWTH_TOKENS)
    mx.eval(cache.arrays)
    buffer_bytes = cache.keys.nbytes
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    token = mx.zeros((1, HEADS, 1, 4096))
    cache.write(token, token, Span.make((7,), 1))
    mx.eval(cache.arrays)
    assert mx.get_peak_memory() - before < buffer_bytes / 4
    held = (cache.keys[:], cache.values[:])
    mx.eval(held)
    mx.reset_peak_memory()
    cache.write(token, token, Span.make((8,), 1))
    mx.eval(cache.arrays)
    assert mx.get_peak_memory() - before > buffer_bytes


on_the_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU's fused attention makes no scores")


@on_the_cpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("starts", [(300, 300), (300, 170)], ids=["even", "uneven"])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_prompts_and_scores_beyond_the_budget_are_computed_by_numpy_and_give_the_same(
    monkeypatch, starts, num_tokens, dtype
):
    calls: list[int] = []

    def attended() -> mx.array:
        cache = KVCache.empty(2, HEADS, WIDTH, dtype)
        write(cache, random_keys(2, 300).astype(dtype), (0, 0))
        keys = random_keys(2, num_tokens, seed=1).astype(dtype)
        queries = mx.concatenate([random_keys(2, num_tokens, seed=2), random_keys(2, num_tokens, seed=3)], axis=1)
        return cache.attend(queries, keys, -keys, Span.make(starts, num_tokens), scale=0.5)

    def counted(*arguments: object) -> mx.array:
        calls.append(1)
        return cpu_attention.attend_on_cpu(*arguments)

    monkeypatch.setattr(kv_cache, "attend_on_cpu", counted)
    num_scores = 2 * 2 * HEADS * num_tokens * (300 + num_tokens)
    monkeypatch.setattr(cpu_attention, "MIN_SCORES", num_scores)
    monkeypatch.setattr(cpu_attention, "SCORE_BYTES", num_scores * 4)
    by_mlx = attended()
    assert not calls
    which = "SCORE_BYTES" if num_tokens == 1 else "MIN_SCORES"
    monkeypatch.setattr(cpu_attention, which, getattr(cpu_attention, which) - 4)
    assert relative_error(attended(), by_mlx) < 1e-5
    assert len(calls) == 1
