"""How the buffers of every attention cache grow: rarely, and never past what was planned."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import pytest

from lfm_mlx.cache import GROWTH_TOKENS, AttentionCache, KVCache, QuantizedKVCache

CACHES: dict[str, Callable[[], AttentionCache]] = {
    "plain": lambda: KVCache.empty(1, 1, 32, mx.bfloat16),
    "8 bits": lambda: QuantizedKVCache.empty(1, 1, 32, 8),
    "4 bits": lambda: QuantizedKVCache.empty(1, 1, 32, 4),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> AttentionCache:
    return CACHES[request.param]()


def rounded_up(num_tokens: int) -> int:
    return -(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS


def capacities(cache: AttentionCache, upto: int) -> list[int]:
    """The capacity after room was made for each number of tokens, 1 to `upto`."""
    grown = []
    for num_tokens in range(1, upto + 1):
        cache.reserve(num_tokens)
        grown.append(cache.capacity)
    return grown


@pytest.mark.parametrize("planned_len", [None, 1000, 2000])
def test_there_is_always_room_in_whole_steps_in_every_buffer(cache, planned_len):
    cache.planned_len = planned_len
    for num_tokens, capacity in enumerate(capacities(cache, 3000), start=1):
        assert capacity >= num_tokens
        assert capacity % GROWTH_TOKENS == 0
    assert {array.shape[:3] for array in cache.arrays} == {(1, 1, cache.capacity)}


def test_without_a_plan_a_buffer_grows_by_at_least_half(cache):
    sizes = sorted(set(capacities(cache, 3000)))
    assert sizes[0] == GROWTH_TOKENS
    assert all(before * 1.5 <= after < before * 1.5 + GROWTH_TOKENS for before, after in itertools.pairwise(sizes))


@pytest.mark.parametrize("planned_len", [1, 255, 256, 257, 1000, 1281, 2048, 3000])
def test_with_a_plan_a_buffer_never_grows_past_it(cache, planned_len):
    cache.planned_len = planned_len
    assert max(capacities(cache, planned_len)) == rounded_up(planned_len)


def test_control_without_a_plan_a_buffer_grows_past_what_is_needed(cache):
    assert max(capacities(cache, 1281)) > rounded_up(1281)


def test_below_its_plan_a_buffer_grows_as_rarely_as_without_one(cache):
    cache.planned_len = 3000
    sizes = sorted(set(capacities(cache, 3000)))
    assert all(after >= before * 1.5 for before, after in itertools.pairwise(sizes[:-1]))


def test_tokens_beyond_the_plan_still_find_room_and_no_more_than_that(cache):
    cache.planned_len = 300
    cache.reserve(300)
    cache.reserve(700)
    assert cache.capacity == rounded_up(700)


def test_room_for_much_at_once_is_exactly_that_much(cache):
    cache.reserve(5000)
    assert cache.capacity == rounded_up(5000)
    cache.reserve(10)
    assert cache.capacity == rounded_up(5000)


@pytest.mark.parametrize(("name", "token_bytes"), [("plain", 2 * 32 * 2), ("8 bits", 2 * 40), ("4 bits", 2 * 24)])
def test_bytes_are_those_of_the_capacity(name, token_bytes):
    cache = CACHES[name]()
    cache.reserve(300)
    assert cache.num_bytes == 512 * token_bytes
