"""Quantised keys and values: attention over exactly what is stored, and storage that is close to what came in."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_models import random_tokens, relative_error, tiny_config, tiny_model

from lfm_mlx.cache import KVCache, QuantizedKVCache, Span, kv_group_size, quantized_kv_cache
from lfm_mlx.cache.quantized_kv_cache import KV_BITS, UNPACK_FROM_ROWS, Packed
from lfm_mlx.errors import OptionError
from lfm_mlx.kernels import chunked_attention

TOLERANCE = 1e-5
BROKEN = 100 * TOLERANCE
NUM_HEADS, NUM_KV_HEADS, WIDTH = 4, 2, 64
SCALE = 0.125

BITS = pytest.mark.parametrize("bits", KV_BITS)

CASES = {
    "prefill": ((0,), 200),
    "prefill of equal rows": ((0, 0), 90),
    "later chunk of unequal rows": ((5, 150, 77), 40),
    "few tokens read packed": ((130,), UNPACK_FROM_ROWS * NUM_KV_HEADS // NUM_HEADS - 1),
    "few tokens of unequal rows": ((130, 3), 3),
    "decode": ((300,), 1),
    "decode of unequal rows": ((300, 0, 64), 1),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", 1)


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By MLX, as on a GPU."""
    monkeypatch.setattr(quantized_kv_cache, "is_for_cpu", lambda *_: False)


@pytest.fixture(params=[False, True], ids=["by MLX", "by numpy"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_kv_cache, "is_for_cpu", lambda *_: request.param)


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def drawn_rows(starts: tuple[int, ...], num_tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    """Queries (B, H, L, P) for the last L tokens, and keys and values (B, G, S, P) of all."""
    batch_size, longest = len(starts), max(starts) + num_tokens
    queries = drawn(batch_size, NUM_HEADS, num_tokens, WIDTH, seed=0) * 3
    keys, values = (drawn(batch_size, NUM_KV_HEADS, longest, WIDTH, seed=seed) for seed in (1, 2))
    return queries, keys, values


def attended(bits: int, starts: tuple[int, ...], num_tokens: int) -> tuple[mx.array, QuantizedKVCache]:
    """What a cache answers to the last tokens, after it was given the ones before."""
    queries, keys, values = drawn_rows(starts, num_tokens)
    cache = QuantizedKVCache.empty(len(starts), NUM_KV_HEADS, WIDTH, bits)
    if max(starts):
        before = slice(0, max(starts))
        cache.write(keys[:, :, before], values[:, :, before], Span.make((0,) * len(starts), max(starts)))
    new = [latest(array, starts, num_tokens) for array in (keys, values)]
    return cache.attend(queries, *new, Span.make(starts, num_tokens), SCALE), cache


def latest(columns: mx.array, starts: tuple[int, ...], num_tokens: int) -> mx.array:
    """The columns of each row's last tokens, (B, G, L, P)."""
    return mx.stack([row[:, start : start + num_tokens] for row, start in zip(columns, starts, strict=True)])


def unpacked(packed: Packed, cache: QuantizedKVCache) -> mx.array:
    return mx.dequantize(*packed, group_size=cache.group_size, bits=cache.bits)


def exact(starts: tuple[int, ...], num_tokens: int, keys: mx.array, values: mx.array) -> mx.array:
    """Fused attention of the same queries over float32 keys and values."""
    span = Span.make(starts, num_tokens)
    queries, _, _ = drawn_rows(starts, num_tokens)
    seen = slice(0, span.end)
    return mx.fast.scaled_dot_product_attention(
        queries, keys[:, :, seen], values[:, :, seen], scale=SCALE, mask=span.mask
    )


@pytest.mark.usefixtures("either_way")
@BITS
@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_over_the_stored_keys_and_values_unpacked(bits, case):
    found, cache = attended(bits, *CASES[case])
    expected = exact(*CASES[case], unpacked(cache.keys, cache), unpacked(cache.values, cache))
    assert relative_error(found, expected) < TOLERANCE


@BITS
@pytest.mark.parametrize("case", CASES)
def test_reading_packed_and_unpacking_first_give_the_same(monkeypatch, bits, case):
    found = []
    for rows in (0, 10**9):
        monkeypatch.setattr(quantized_kv_cache, "UNPACK_FROM_ROWS", rows)
        found.append(attended(bits, *CASES[case])[0])
    assert relative_error(found[0], found[1]) < TOLERANCE


@pytest.mark.usefixtures("either_way")
@BITS
@pytest.mark.parametrize("case", CASES)
def test_control_keys_and_values_as_they_came_in_give_something_else(bits, case):
    found, _ = attended(bits, *CASES[case])
    assert relative_error(found, exact(*CASES[case], *drawn_rows(*CASES[case])[1:])) > BROKEN


@pytest.mark.usefixtures("either_way")
@BITS
@pytest.mark.parametrize("swapped", ["keys", "values"])
def test_control_one_wrong_column_is_noticed(bits, swapped):
    case = CASES["later chunk of unequal rows"]
    found, cache = attended(bits, *case)
    stored = {"keys": unpacked(cache.keys, cache), "values": unpacked(cache.values, cache)}
    stored[swapped] = mx.concatenate([stored[swapped][:, :, 1:2], stored[swapped][:, :, 1:]], axis=2)
    assert relative_error(found, exact(*case, stored["keys"], stored["values"])) > BROKEN


@BITS
def test_what_is_stored_is_within_half_a_step_of_what_came_in(bits):
    keys = drawn(1, NUM_KV_HEADS, 50, WIDTH, seed=1)
    cache = QuantizedKVCache.empty(1, NUM_KV_HEADS, WIDTH, bits)
    cache.write(keys, -keys, Span.make((0,), 50))
    spread = np.array(keys).max(axis=-1) - np.array(keys).min(axis=-1)  # (1, G, L): one group a head
    # MLX moves a group's zero onto a code, which may cost the other end of the group up to a step.
    most = spread[..., None] / (2**bits - 1)
    for stored, expected in ((cache.keys, keys), (cache.values, -keys)):
        error = np.abs(np.array(unpacked(stored, cache)[:, :, :50]) - np.array(expected))
        assert (error <= most).all()
        assert error.mean() < most.mean() * 0.3


@pytest.mark.parametrize("case", CASES)
def test_eight_bits_stay_within_their_rounding_of_unquantised_attention(case):
    found, _ = attended(8, *CASES[case])
    expected = exact(*CASES[case], *drawn_rows(*CASES[case])[1:])
    assert relative_error(found, expected) < 0.02
    coarse, _ = attended(4, *CASES[case])
    assert relative_error(coarse, expected) > 2 * relative_error(found, expected)


def test_sixteen_bit_activations_come_back_in_sixteen_bits():
    queries, keys, values = (array.astype(mx.bfloat16) for array in drawn_rows((0,), 20))
    cache = QuantizedKVCache.empty(1, NUM_KV_HEADS, WIDTH, 8)
    assert cache.attend(queries, keys, values, Span.make((0,), 20), SCALE).dtype == mx.bfloat16
    assert {array.dtype for array in cache.arrays} == {mx.uint32, mx.float32}


@pytest.mark.parametrize("bits", [0, 2, 3, 6, 16, -8])
def test_other_bits_are_refused(bits):
    with pytest.raises(OptionError, match=f"^kv_bits is {bits}, expected one of 4, 8$"):
        QuantizedKVCache.empty(1, NUM_KV_HEADS, WIDTH, bits)


@pytest.mark.parametrize("head_dim", [8, 16, 48, 80])
def test_a_head_width_that_no_group_divides_is_refused(head_dim):
    with pytest.raises(OptionError, match=f"head width {head_dim} is no multiple of 32; leave kv_bits out"):
        QuantizedKVCache.empty(1, NUM_KV_HEADS, head_dim, 8)


@pytest.mark.parametrize(("head_dim", "group_size"), [(32, 32), (64, 64), (96, 32), (128, 64)])
def test_groups_are_as_large_as_the_head_width_allows(head_dim, group_size):
    assert kv_group_size(head_dim, 8) == group_size


# Snapshots and batches.


def codes(cache: QuantizedKVCache, num_tokens: int) -> list[np.ndarray]:
    return [np.array(array[:, :, :num_tokens]) for array in cache.arrays]


def written(batch_size: int, num_tokens: int, seed: int, bits: int = 8) -> QuantizedKVCache:
    cache = QuantizedKVCache.empty(batch_size, NUM_KV_HEADS, WIDTH, bits)
    keys, values = (drawn(batch_size, NUM_KV_HEADS, num_tokens, WIDTH, seed=seed + i) for i in (0, 1))
    cache.write(keys, values, Span.make((0,) * batch_size, num_tokens))
    return cache


@BITS
def test_a_snapshot_is_not_moved_by_what_follows_and_can_be_restored_twice(bits):
    cache = written(1, 40, seed=1, bits=bits)
    snapshot, before = cache.snapshot(40), codes(cache, 40)
    for start in (0, 30):
        keys = drawn(1, NUM_KV_HEADS, 10, WIDTH, seed=9 + start)
        cache.write(keys, keys, Span.make((start,), 10))
        assert all((a != b).any() for a, b in zip(codes(cache, 40), before, strict=True))
        cache.restore(snapshot)
        assert all((a == b).all() for a, b in zip(codes(cache, 40), before, strict=True))
        cache.write(keys, keys, Span.make((20,), 10))
        mx.eval(cache.arrays)
        assert all((np.array(a) == b).all() for a, b in zip(snapshot, before, strict=True))


@BITS
def test_keep_and_join_move_whole_rows_and_pad_the_shorter_buffer(bits):
    cache, longer = written(3, 5, seed=1, bits=bits), written(1, 300, seed=5, bits=bits)
    before, added = codes(cache, 5), codes(longer, 300)
    cache.keep(mx.array([2, 0]))
    cache.join(longer)
    assert cache.capacity == longer.capacity
    for found, kept, joined in zip(codes(cache, 300), before, added, strict=True):
        assert (found[0, :, :5] == kept[2]).all()
        assert (found[1, :, :5] == kept[0]).all()
        assert (found[2] == joined[0]).all()
        assert (kept[2] != kept[0]).any()


@BITS
def test_a_model_continues_a_restored_kept_or_joined_row_as_if_nothing_had_happened(bits):
    model = tiny_model(tiny_config(head_dim=32))
    tokens = random_tokens(2, 330)

    def alone(row: int, split: int) -> mx.array:
        state = model.new_state(kv_bits=bits)
        model(tokens[row : row + 1, :split], state)
        return model(tokens[row : row + 1, split : split + 30], state)[0]

    state, late = model.new_state(2, kv_bits=bits), model.new_state(kv_bits=bits)
    model(tokens[:, :20], state)
    snapshot = state.snapshot()
    model(random_tokens(2, 40, seed=1), state)
    state.restore(snapshot)
    state.keep([1])
    model(tokens[:1, :300], late)
    state.join(late)
    found = model(mx.stack([tokens[1, 20:50], tokens[0, 300:330]]), state)
    assert relative_error(found, mx.stack([alone(1, 20), alone(0, 300)])) < TOLERANCE
    assert relative_error(found, mx.stack([alone(0, 20), alone(1, 300)])) > 0.1


# Memory.


BUDGET = 256 << 10
MOST_LIVE = 16
"""Arrays of the size of a chunk's scores that may be alive at once: MLX computes a few operations ahead."""

NUM_QUERIES = 64


def peak_bytes(cache: QuantizedKVCache | KVCache, num_columns: int) -> int:
    """Most bytes that 64 queries take at the end of a long row, beside the cache."""
    cache.reserve(num_columns)
    mx.eval(cache.arrays)
    queries = drawn(1, NUM_HEADS, NUM_QUERIES, 32, seed=0)
    keys, values = (drawn(1, 1, NUM_QUERIES, 32, seed=seed) for seed in (1, 2))
    span = Span.make((num_columns - NUM_QUERIES,), NUM_QUERIES)
    mx.eval(span.columns, queries, keys, values)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cache.attend(queries, keys, values, span, SCALE), cache.arrays)
    return mx.get_peak_memory() - before


@BITS
@pytest.mark.parametrize("num_columns", [8_192, 32_768])
def test_attention_takes_no_more_memory_for_a_longer_context(monkeypatch, bits, num_columns):
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", BUDGET)
    assert peak_bytes(QuantizedKVCache.empty(1, 1, 32, bits), num_columns) < MOST_LIVE * BUDGET


@BITS
def test_control_one_chunk_of_everything_takes_more_memory(monkeypatch, bits):
    monkeypatch.setattr(chunked_attention, "SCORE_BYTES", 64 << 20)
    monkeypatch.setattr(chunked_attention, "MAX_CHUNK_COLUMNS", 32_768)
    assert peak_bytes(QuantizedKVCache.empty(1, 1, 32, bits), 32_768) > 2 * MOST_LIVE * BUDGET
