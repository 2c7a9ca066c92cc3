"""The prefix cache: what continues from it is the same computation, and what it holds is what it says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from random_models import tiny_config, tiny_model

from lfm_mlx.cache import Block, PrefixCache, State
from lfm_mlx.errors import OptionError
from lfm_mlx.model import Model
from lfm_mlx.step import stepper_of

BLOCK = 16
BORDER = 5
MODEL = tiny_model(tiny_config(head_dim=32))
KV_BITS = pytest.mark.parametrize("kv_bits", [None, 8, 4])


def new_cache(model: Model = MODEL, *, kv_bits: int | None = None, max_bytes: int = 1 << 30) -> PrefixCache:
    return PrefixCache(model.config, dtype=model.dtype, kv_bits=kv_bits, max_bytes=max_bytes, block_tokens=BLOCK)


def drawn(num_tokens: int, seed: int = 0) -> list[int]:
    """Random ids without borders."""
    return [int(i) for i in np.random.default_rng(seed).integers(8, 97, num_tokens)]


def run(cache: PrefixCache, ids: list[int], *, model: Model = MODEL, kv_bits: int | None = None) -> tuple[int, Any]:
    """Compute a prompt with the cache's help and keep it there: tokens reused, and logits (V,)."""
    state = model.new_state(kv_bits=kv_bits)
    num_reused = cache.restore(ids, state)
    state.ask(cache.places(ids, num_reused, {BORDER}))
    logits = stepper_of(model).prefill(state, mx.array([ids[num_reused:]]), chunk_size=37)
    cache.insert(ids, state, 0, state.take_checkpoints())
    return num_reused, np.array(logits[0])


def cold(ids: list[int], *, model: Model = MODEL, kv_bits: int | None = None) -> Any:
    return np.array(stepper_of(model).prefill(model.new_state(kv_bits=kv_bits), mx.array([ids]))[0])


def is_equal(found: Any, expected: Any) -> bool:
    """Equal to 1e-5 of the largest logit."""
    return bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())


FIRST = [*drawn(40), BORDER, *drawn(30, 1)]


@pytest.mark.parametrize(
    ("ids", "num_reused", "kv_bits"),
    [
        ([*FIRST, *drawn(9, 2)], 70, None),  # The next turn: up to the last token of the prompt before.
        (FIRST, 70, None),  # The same prompt: its last token has to be computed.
        ([*FIRST[:60], *drawn(9, 2)], 48, None),  # An edit: up to the end of the last whole block,
        ([*FIRST[:47], *drawn(9, 2)], 40, None),  # or to the border of a message, if that is further.
        ([*FIRST[:47], *drawn(9, 2)], 40, 8),
        ([*FIRST[:47], *drawn(9, 2)], 40, 4),
        ([*FIRST[:35], *drawn(9, 2)], 32, None),
        (FIRST[:33], 32, None),
        (FIRST[:32], 16, None),
        ([*FIRST[:16], 9], 16, 8),
        ([*FIRST[:15], 9], 0, None),
        ([9, *FIRST], 0, 8),
    ],
)
def test_a_prompt_goes_on_from_the_furthest_place_that_it_shares(
    ids: list[int], num_reused: int, kv_bits: int | None
) -> None:
    cache = new_cache(kv_bits=kv_bits)
    assert run(cache, FIRST, kv_bits=kv_bits)[0] == 0
    assert cache.find(ids) == num_reused
    reused, logits = run(cache, ids, kv_bits=kv_bits)
    assert reused == num_reused
    assert is_equal(logits, cold(ids, kv_bits=kv_bits))
    assert not is_equal(logits, cold([*ids[:-1], 6], kv_bits=kv_bits))
    assert (cache.num_hits, cache.num_misses) == ((1, 1) if num_reused else (0, 2))
    assert cache.num_reused_tokens == num_reused


def test_a_change_in_the_first_block_leaves_half_of_what_is_in_front_of_it() -> None:
    cache = PrefixCache(MODEL.config, dtype=MODEL.dtype, max_bytes=1 << 30, block_tokens=256)
    ids = drawn(200)
    run(cache, ids)
    assert [cache.find([*ids[:at], 6, *ids[at + 1 :]]) for at in (31, 40, 64, 100, 150, 199)] == [
        0,
        32,
        64,
        64,
        128,
        199,
    ]
    changed = [*ids[:150], 6, 7]
    reused, logits = run(cache, changed)
    assert reused == 128
    assert is_equal(logits, cold(changed))


@KV_BITS
def test_greedy_tokens_after_a_restored_prefix_are_those_of_a_cold_run(kv_bits: int | None) -> None:
    cache = new_cache(kv_bits=kv_bits)
    run(cache, FIRST, kv_bits=kv_bits)
    ids = [*FIRST, *drawn(9, 2)]
    warm = MODEL.new_state(kv_bits=kv_bits)
    num_reused = cache.restore(ids, warm)
    assert num_reused == 70
    assert greedy(warm, ids[num_reused:]) == greedy(MODEL.new_state(kv_bits=kv_bits), ids)


def greedy(state: State, ids: list[int]) -> list[int]:
    stepper = stepper_of(MODEL)
    logits = stepper.prefill(state, mx.array([ids]))
    found = []
    for _ in range(20):
        token = mx.argmax(logits, axis=-1)
        found.append(int(token.item()))
        logits = stepper.decode(state, token)
    return found


def damaged_checkpoint(cache: PrefixCache, path: list[Any]) -> None:
    block = path[-1].value.block
    block.checkpoints = {n: rows[:, ::-1] for n, rows in block.checkpoints.items()}


def other_places_checkpoint(cache: PrefixCache, path: list[Any]) -> None:
    path[-1].value.block.checkpoints = {48: path[-2].value.block.checkpoints[32]}


def shifted_block(cache: PrefixCache, path: list[Any]) -> None:
    """The same tokens, one position further."""
    state = MODEL.new_state(kv_bits=cache.kv_bits)
    MODEL(mx.array([[9, *drawn(60)]]), state)
    path[1].value.block.columns = Block.copied(state, 0, 17, 33).columns


def repeated_block(cache: PrefixCache, path: list[Any]) -> None:
    path[1].value.block.columns = path[0].value.block.columns


def exchanged_layers(cache: PrefixCache, path: list[Any]) -> None:
    path[1].value.block.columns = [array[::-1] for array in path[1].value.block.columns]


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize(
    "break_it", [damaged_checkpoint, other_places_checkpoint, shifted_block, repeated_block, exchanged_layers]
)
def test_control_a_wrong_restore_gives_other_logits(break_it: Any, kv_bits: int | None) -> None:
    cache = new_cache(kv_bits=kv_bits)
    run(cache, drawn(60), kv_bits=kv_bits)
    ids = [*drawn(48), 9]
    path = cache._tree.find(ids[:48]).path
    assert [node.stop for node in path] == [16, 32, 48]
    break_it(cache, path)
    reused, logits = run(cache, ids, kv_bits=kv_bits)
    assert reused == 48
    assert not is_equal(logits, cold(ids, kv_bits=kv_bits))


@pytest.mark.parametrize(("kv_bits", "taps"), [(None, 3), (8, 4)])
def test_a_row_of_a_batch_leaves_its_own_prefix(kv_bits: int | None, taps: int) -> None:
    model = tiny_model(tiny_config(head_dim=32, conv_L_cache=taps))
    stepper = stepper_of(model)
    rows = [drawn(20, 1), drawn(33, 2), drawn(27, 3)]
    padded = mx.array([ids + [0] * (33 - len(ids)) for ids in rows])
    state = model.new_state(3, kv_bits=kv_bits)
    stepper.prefill(state, padded, [len(ids) for ids in rows])
    for token in (11, 12):
        stepper.decode(state, mx.array([token] * 3))
    cache = new_cache(model, kv_bits=kv_bits)
    for row, ids in enumerate(rows):
        cache.insert([*ids, 11, 12], state, row, {len(ids) + 2: state.checkpoint(row)})
    for ids in rows:
        reused, logits = run(cache, [*ids, 11, 12, 13], model=model, kv_bits=kv_bits)
        assert reused == len(ids) + 2
        assert is_equal(logits, cold([*ids, 11, 12, 13], model=model, kv_bits=kv_bits))


def test_what_is_restored_stays_when_the_cache_is_cleared_and_the_row_writes_on() -> None:
    cache = new_cache()
    run(cache, FIRST)
    state = MODEL.new_state()
    state.reserve(600)
    assert cache.restore([*FIRST, 9], state) == 70
    assert state.attentions[0].capacity == 768
    cache.clear()
    assert (cache.num_bytes, cache.num_blocks) == (0, 0)
    ids = [*FIRST, *drawn(300, 4)]
    logits = stepper_of(MODEL).prefill(state, mx.array([ids[70:]]))
    assert is_equal(np.array(logits[0]), cold(ids))
    assert cache.find(ids) == 0


def test_the_cache_is_not_changed_by_what_a_restored_row_writes() -> None:
    cache = new_cache()
    run(cache, FIRST)
    for _ in range(3):
        state = MODEL.new_state()
        assert cache.restore([*FIRST, 9], state) == 70
        assert is_equal(
            np.array(stepper_of(MODEL).prefill(state, mx.array([drawn(50, 8)]))[0]), cold(FIRST[:70] + drawn(50, 8))
        )


@pytest.fixture
def no_spare_buffers() -> Iterator[None]:
    """Freed buffers are not used again: MLX would take larger ones for smaller arrays."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


def held_bytes() -> int:
    mx.synchronize()
    gc.collect()
    return mx.get_active_memory()


@pytest.mark.parametrize("kv_bits", [None, 4])
@pytest.mark.usefixtures("no_spare_buffers")
def test_bytes_said_are_bytes_held(kv_bits: int | None) -> None:
    cache = new_cache(kv_bits=kv_bits)
    run(cache, FIRST, kv_bits=kv_bits)
    cache.clear()
    before = held_bytes()
    run(cache, FIRST, kv_bits=kv_bits)
    for n in (65, 50, 33, 20, 7):
        run(cache, [*FIRST[:n], *drawn(60, n)], kv_bits=kv_bits)
    assert held_bytes() - before == pytest.approx(cache.num_bytes, rel=0.01)
    assert cache.num_bytes > 50_000
    cache.shrink(cache.num_bytes // 2)
    assert held_bytes() - before == pytest.approx(cache.num_bytes, rel=0.01)


def test_nested_prefixes_are_held_once() -> None:
    ids = drawn(400)
    longest = new_cache()
    run(longest, ids)
    nested = new_cache()
    for n in range(40, 401, 40):
        run(nested, ids[:n])
    assert nested.num_blocks == longest.num_blocks
    assert nested.num_bytes <= 1.2 * longest.num_bytes


def test_many_rows_share_the_block_in_which_they_part() -> None:
    cache = new_cache()
    for user in range(10):
        assert run(cache, [*drawn(40), BORDER, *drawn(6, 100 + user)])[0] == (40 if user else 0)
    assert sum(len(node.tokens) for node in cache._tree) <= 41 + 10 * 5


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = new_cache()
    for seed in range(4):
        run(cache, drawn(40, seed))
    assert cache.restore(drawn(40, 0), MODEL.new_state()) == 39
    cache.shrink(cache.num_bytes // 2)
    assert [cache.find(drawn(40, seed)) > 0 for seed in range(4)] == [True, False, False, True]
    assert cache.num_evictions > 0


@pytest.mark.parametrize(("max_tails", "num_ends", "found"), [(1024, 101, [59, 4, 4]), (20, 21, [48, 1, 4])])
def test_short_prompts_leave_a_limited_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch, max_tails: int, num_ends: int, found: list[int]
) -> None:
    monkeypatch.setattr("lfm_mlx.cache.prefix.MAX_TAILS", max_tails)
    cache = new_cache()
    long = drawn(60, 99)
    short = [[1, *divmod(number, 10), 7, 7] for number in range(100)]
    for ids in (long, *short):
        run(cache, ids)
    # Of the long prompt, which was not used for longest, only the last block may be gone.
    assert [cache.find(ids) for ids in (long, short[0], short[-1])] == found
    ends = [node for node in cache._tree if not node.children]
    assert len(ends) == num_ends
    assert cache.num_blocks < 1.5 * num_ends
    cache.clear()
    assert not cache._tails


def test_a_prompt_larger_than_the_cache_leaves_its_beginning() -> None:
    whole = new_cache()
    run(whole, drawn(200))
    cache = new_cache(max_bytes=whole.num_bytes // 2)
    run(cache, drawn(200))
    assert 0 < cache.num_bytes <= cache.max_bytes
    reused, logits = run(cache, drawn(200))
    assert 60 < reused < 120
    assert is_equal(logits, cold(drawn(200)))


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": 1, "block_tokens": 0}])
def test_limits_that_are_not_positive_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="is 0, expected at least 1"):
        PrefixCache(MODEL.config, dtype=MODEL.dtype, **options)


def test_a_state_that_does_not_fit_is_refused() -> None:
    cache = new_cache()
    with pytest.raises(OptionError, match="of another model, dtype or kv_bits"):
        cache.restore([1, 2], MODEL.new_state(kv_bits=8))
    with pytest.raises(OptionError, match=r"rows of \[0, 0\] tokens, expected a single one of 0"):
        cache.restore([1, 2], MODEL.new_state(2))
    with pytest.raises(OptionError, match="ids are 3 tokens, but row 0 of the state has seen 0"):
        cache.insert([1, 2, 3], MODEL.new_state(), 0, {})


class AgainstPlaces(RuleBasedStateMachine):
    """A dictionary of the places rows left, and of what evictions may have taken, says what may be reused."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.left: set[tuple[int, ...]] = set()
        self.was_shrunk = False

    ids = st.lists(st.sampled_from([1, 2, BORDER]), min_size=1, max_size=3).flatmap(
        lambda head: st.integers(1, 60).map(lambda n: (head * 60)[:n])
    )

    @rule(ids=ids)
    def insert(self, ids: list[int]) -> None:
        expected = self.longest(ids)
        reused, logits = run(self.cache, ids)
        assert reused <= expected if self.was_shrunk else reused == expected
        self.left |= {tuple(ids[:n]) for n in self.cache.places(ids, 0, {BORDER})}
        if reused and len(self.left) % 5 == 0:
            assert is_equal(logits, cold(ids))

    @rule(ids=ids)
    def find(self, ids: list[int]) -> None:
        found = self.cache.find(ids)
        assert found <= self.longest(ids) if self.was_shrunk else found == self.longest(ids)
        assert not found or tuple(ids[:found]) in self.left

    @rule(kept=st.floats(0.2, 1))
    def shrink(self, kept: float) -> None:
        limit = int(self.cache.num_bytes * kept)
        self.cache.shrink(limit)
        assert self.cache.num_bytes <= limit
        self.was_shrunk = True

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.left, self.was_shrunk = set(), False

    @invariant()
    def bytes_are_the_sum(self) -> None:
        assert self.cache.num_bytes == sum(node.value.block.num_bytes for node in self.cache._tree)
        assert self.cache.num_blocks == len(list(self.cache._tree))

    @invariant()
    def tails_are_known(self) -> None:
        ends = [node for node in self.cache._tree if len(node.tokens) < BLOCK and not node.children]
        assert set(ends) <= set(self.cache._tails) <= set(self.cache._by_age)

    @invariant()
    def parents_are_younger_than_their_children(self) -> None:
        ages = {node: age for age, node in enumerate(self.cache._by_age)}
        assert all(ages[child] < ages[node] for node in self.cache._tree for child in node.children.values())

    def longest(self, ids: list[int]) -> int:
        return max((n for n in range(1, len(ids)) if tuple(ids[:n]) in self.left), default=0)


TestAgainstPlaces = AgainstPlaces.TestCase
TestAgainstPlaces.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
