"""One sequence gives the same logits however it is cut, batched, interrupted or moved between states.

Float32; errors are relative to the largest logit. Every way of computing has a control: the same way with one thing
broken, whose error must be a hundred times the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from random_models import random_tokens, relative_error, tiny_config, tiny_dense_config, tiny_model

from lfm_mlx.cache import ConvState, KVCache, Span, State, kv_cache
from lfm_mlx.errors import ContextLengthError
from lfm_mlx.model import Model

TOLERANCE = 1e-5
BROKEN = 100 * TOLERANCE
LONG = 270
"""Tokens that make a key-value buffer grow past its first 256 columns."""

CONFIGS = {
    "moe": tiny_config(),
    "dense": tiny_dense_config(),
    "four_taps_with_bias": tiny_config(conv_L_cache=4, conv_bias=True, tie_word_embeddings=False),
    "two_taps": tiny_dense_config(conv_L_cache=2, layer_types=["full_attention", "conv", "conv", "full_attention"]),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Model:
    return tiny_model(CONFIGS[request.param])


def whole(model: Model, tokens: mx.array) -> np.ndarray:
    """Logits of each row by itself, in one call without a state: what every other way is compared with."""
    return np.concatenate([np.array(model(tokens[row : row + 1])) for row in range(tokens.shape[0])])


def in_chunks(model: Model, tokens: mx.array, sizes: Sequence[int], state: State | None = None) -> np.ndarray:
    """Logits of all rows together, in calls of these many tokens; the last size repeats."""
    state = state if state is not None else model.new_state(tokens.shape[0])
    done, parts, sizes = 0, [], list(sizes)
    while done < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(np.array(model(tokens[:, done : done + size], state)))
        done += size
    return np.concatenate(parts, axis=1)


def ragged(
    model: Model, tokens: mx.array, *, garbage: int = 0, state: State | None = None, is_masked: bool = True
) -> np.ndarray:
    """Logits of rows that advance by different, random numbers of tokens a call, padded with garbage."""
    batch_size, num_tokens = tokens.shape
    state = state if state is not None else model.new_state(batch_size)
    generator, ids = np.random.default_rng(3), np.array(tokens)
    done, rows = np.zeros(batch_size, dtype=int), [[] for _ in range(batch_size)]
    while done.min() < num_tokens:
        counts = np.minimum(generator.integers(0, 80, batch_size), num_tokens - done)
        padded = np.full((batch_size, max(1, counts.max())), garbage, dtype=np.int32)
        for row, count in enumerate(counts):
            padded[row, :count] = ids[row, done[row] : done[row] + count]
        logits = np.array(model(mx.array(padded), state, lengths=counts.tolist() if is_masked else None))
        for row, count in enumerate(counts):
            rows[row].append(logits[row, :count])
        done += counts
    return np.stack([np.concatenate(parts) for parts in rows])


@pytest.mark.parametrize("sizes", [[7], [1, 2, 3, 5, 31, 32, 33, 90], [255, 1, 1, 13], [LONG]], ids=str)
def test_chunks_of_any_size_give_the_logits_of_the_whole_sequence(model, sizes):
    tokens = random_tokens(1, LONG)
    assert relative_error(in_chunks(model, tokens, sizes), whole(model, tokens)) < TOLERANCE


def test_token_by_token_gives_the_logits_of_the_whole_sequence(model):
    tokens = random_tokens(1, 60)
    assert relative_error(in_chunks(model, tokens, [1]), whole(model, tokens)) < TOLERANCE


def test_token_by_token_across_the_end_of_a_buffer_gives_the_logits_of_the_whole_sequence(moe_model):
    tokens = random_tokens(1, LONG)
    assert relative_error(in_chunks(moe_model, tokens, [225, 1]), whole(moe_model, tokens)) < TOLERANCE


def test_a_buffer_that_grows_twice_keeps_every_key_and_value(dense_model):
    tokens = random_tokens(1, 800)
    assert (
        relative_error(in_chunks(dense_model, tokens, [255, 2, 125, 4, 125, 2, 270]), whole(dense_model, tokens))
        < TOLERANCE
    )


def test_rows_of_equal_length_give_the_logits_of_each_row_alone(model):
    tokens = random_tokens(3, LONG)
    assert relative_error(in_chunks(model, tokens, [100, 1, 154, 3]), whole(model, tokens)) < TOLERANCE


def test_rows_of_unequal_length_give_the_logits_of_each_row_alone_whatever_the_padding_holds(model):
    tokens = random_tokens(3, LONG)
    expected = whole(model, tokens)
    for garbage in (0, 55):
        assert relative_error(ragged(model, tokens, garbage=garbage), expected) < TOLERANCE


def test_padding_without_a_state_leaves_the_real_tokens_alone(model):
    tokens = random_tokens(2, 40)
    logits = np.array(model(tokens, lengths=[40, 25]))
    assert relative_error(logits[1, :25], whole(model, tokens[1:, :25])[0]) < TOLERANCE


def test_a_restored_snapshot_continues_like_an_uninterrupted_run(model):
    tokens, other = random_tokens(2, LONG), random_tokens(2, 90, seed=1)
    expected = whole(model, tokens)
    state = model.new_state(2)
    in_chunks(model, tokens[:, :200], [100], state)
    snapshot = state.snapshot()
    in_chunks(model, other, [1, 89], state)
    for sizes in ([1, 1, 68], [70]):
        state.restore(snapshot)
        assert relative_error(in_chunks(model, tokens[:, 200:], sizes, state), expected[:, 200:]) < TOLERANCE
    fresh = model.new_state(2)
    fresh.restore(snapshot)
    assert relative_error(in_chunks(model, tokens[:, 200:], [60], fresh), expected[:, 200:]) < TOLERANCE


def test_a_snapshot_of_unequal_rows_continues_like_each_row_alone(model):
    tokens = random_tokens(2, 300)
    expected = whole(model, tokens)
    state = model.new_state(2)
    model(tokens[:, :90], state, lengths=[90, 31])
    snapshot = state.snapshot()
    model(random_tokens(2, 9, seed=2), state, lengths=[2, 9])
    for _ in range(2):
        state.restore(snapshot)
        following = mx.stack([tokens[0, 90:290], tokens[1, 31:231]])
        logits = in_chunks(model, following, [1, 60], state)
        assert relative_error(logits[0], expected[0, 90:290]) < TOLERANCE
        assert relative_error(logits[1], expected[1, 31:231]) < TOLERANCE


def test_kept_reordered_and_joined_rows_continue_like_each_row_alone(model):
    tokens = random_tokens(4, 330)
    expected = whole(model, tokens)
    state = model.new_state(3)
    model(tokens[:3, :120], state, lengths=[120, 70, 20])
    late = model.new_state(1)
    in_chunks(model, tokens[3:, :270], [270], late)
    state.keep([2, 0])
    state.join(late)
    assert state.lengths == (20, 120, 270)
    following = mx.stack([tokens[2, 20:80], tokens[0, 120:180], tokens[3, 270:330]])
    logits = in_chunks(model, following, [1, 1, 29], state)
    assert relative_error(logits, [expected[2, 20:80], expected[0, 120:180], expected[3, 270:330]]) < TOLERANCE
    state.keep([0])
    logits = in_chunks(model, tokens[2:3, 80:], [100], state)
    assert relative_error(logits, expected[2:3, 80:]) < TOLERANCE


def test_a_row_kept_twice_continues_in_two_directions(model):
    tokens, other = random_tokens(1, 80), random_tokens(1, 80, seed=4)
    state = model.new_state()
    model(tokens[:, :50], state)
    state.keep([0, 0])
    forked = mx.concatenate([tokens, mx.concatenate([tokens[:, :50], other[:, 50:]], axis=1)])
    logits = in_chunks(model, forked[:, 50:], [1, 12], state)
    assert relative_error(logits, whole(model, forked)[:, 50:]) < TOLERANCE


# What must fail.

Breakage = Callable[[pytest.MonkeyPatch], None]


def state_never_advances(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "advance", lambda self, span: None)


def positions_one_too_far(patch: pytest.MonkeyPatch) -> None:
    begin = State.begin

    def shifted(self, num_tokens, counts=None):
        lengths, self.lengths = self.lengths, tuple(n + 1 if n else 0 for n in self.lengths)
        span = begin(self, num_tokens, counts)
        self.lengths = lengths
        return span

    patch.setattr(State, "begin", shifted)


def conv_state_one_column_off(patch: pytest.MonkeyPatch) -> None:
    extend = ConvState.extend

    def late(self, inputs, span):
        seen = extend(self, inputs, span)
        first = span.num_tokens - 1
        self.rows = tuple(seen[:, max(0, first + i), None, None] for i in range(len(self.rows)))
        return seen

    patch.setattr(ConvState, "extend", late)


def conv_state_ignores_padding(patch: pytest.MonkeyPatch) -> None:
    extend = ConvState.extend
    patch.setattr(ConvState, "extend", lambda self, x, span: extend(self, x, Span.make(span.starts, span.num_tokens)))


def attention_sees_everything_in_the_buffer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Span, "mask", None)
    patch.setattr(kv_cache, "is_for_cpu", lambda *_: False)  # It needs no mask.


def buffer_growth_forgets_the_past(patch: pytest.MonkeyPatch) -> None:
    reserve = KVCache.reserve

    def forgetting(self, num_tokens):
        if num_tokens > self.capacity:
            self.arrays = tuple(mx.zeros_like(array) for array in self.arrays)
        reserve(self, num_tokens)

    patch.setattr(KVCache, "reserve", forgetting)


def conv_rows_are_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ConvState, "restore", lambda self, rows: None)


def keys_are_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCache, "restore", lambda self, stored: None)


def rows_keep_their_order(patch: pytest.MonkeyPatch) -> None:
    keep = ConvState.keep
    patch.setattr(ConvState, "keep", lambda self, rows: keep(self, mx.arange(rows.size)))


Measure = Callable[[Model, Callable[[], None]], float]
"""The error of one way of computing, after calling what breaks it; the reference is computed before."""


def chunk_error(model: Model, break_it: Callable[[], None]) -> float:
    tokens = random_tokens(1, LONG)
    expected = whole(model, tokens)
    break_it()
    return relative_error(in_chunks(model, tokens, [50]), expected)


def ragged_error(model: Model, break_it: Callable[[], None]) -> float:
    tokens = random_tokens(4, 120)
    expected = whole(model, tokens)
    break_it()
    return relative_error(ragged(model, tokens, garbage=5), expected)


def restore_error(model: Model, break_it: Callable[[], None]) -> float:
    tokens = random_tokens(1, 60)
    expected = whole(model, tokens)[:, 30:]
    break_it()
    state = model.new_state()
    model(tokens[:, :30], state)
    snapshot = state.snapshot()
    state = used_state(model)
    state.restore(snapshot)
    return relative_error(model(tokens[:, 30:], state), expected)


def used_state(model: Model) -> State:
    """A state that has seen something else."""
    state = model.new_state()
    model(random_tokens(1, 30, seed=1), state)
    return state


def keep_error(model: Model, break_it: Callable[[], None]) -> float:
    tokens = random_tokens(2, 60)
    expected = whole(model, tokens[::-1])[:, 30:]
    break_it()
    state = model.new_state(2)
    model(tokens[:, :30], state)
    state.keep([1, 0])
    return relative_error(model(tokens[::-1, 30:], state), expected)


@pytest.mark.parametrize("measure", [chunk_error, ragged_error, restore_error, keep_error], ids=lambda f: f.__name__)
def test_each_measure_below_is_within_the_tolerance_while_nothing_is_broken(moe_model, measure: Measure):
    assert measure(moe_model, lambda: None) < TOLERANCE


@pytest.mark.parametrize(
    ("breakage", "measure"),
    [
        (state_never_advances, chunk_error),
        (positions_one_too_far, chunk_error),
        (conv_state_one_column_off, chunk_error),
        (attention_sees_everything_in_the_buffer, chunk_error),
        (buffer_growth_forgets_the_past, chunk_error),
        (state_never_advances, ragged_error),
        (conv_state_ignores_padding, ragged_error),
        (attention_sees_everything_in_the_buffer, ragged_error),
        (conv_rows_are_not_restored, restore_error),
        (keys_are_not_restored, restore_error),
        (rows_keep_their_order, keep_error),
    ],
    ids=lambda value: value.__name__,
)
def test_control_a_broken_state_is_noticed(moe_model, monkeypatch, breakage: Breakage, measure: Measure):
    assert measure(moe_model, lambda: breakage(monkeypatch)) > BROKEN


def test_control_unmasked_padding_is_noticed(moe_model):
    tokens = random_tokens(4, 100)
    assert relative_error(ragged(moe_model, tokens, is_masked=False), whole(moe_model, tokens)) > BROKEN


def test_a_row_may_fill_the_context_and_not_one_token_more():
    model = tiny_model(tiny_dense_config(max_position_embeddings=48))
    tokens = random_tokens(1, 48)
    state = model.new_state()
    logits = in_chunks(model, tokens, [47, 1], state)
    assert relative_error(logits, whole(model, tokens)) < TOLERANCE
    with pytest.raises(ContextLengthError, match=r"49 tokens, expected at most 48 \(max_position_embeddings\)"):
        model(tokens[:, :1], state)
    assert state.lengths == (48,)


def test_padding_may_reach_past_the_context_because_it_is_no_token():
    model = tiny_model(tiny_dense_config(max_position_embeddings=48))
    tokens = random_tokens(2, 48)
    state = model.new_state(2)
    model(tokens[:, :40], state, lengths=[40, 30])
    logits = np.array(model(mx.concatenate([tokens[:, 40:], tokens[:, :2]], axis=1), state, lengths=[8, 0]))
    assert state.lengths == (48, 30)
    assert relative_error(logits[0, :8], whole(model, tokens[:1])[0, 40:]) < TOLERANCE
    with pytest.raises(ContextLengthError):
        model(tokens[:, :1], state, lengths=[1, 0])
