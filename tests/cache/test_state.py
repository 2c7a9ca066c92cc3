"""The state of a batch: lengths, limits, and snapshots that own their memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest
from random_models import random_tokens, tiny_config, tiny_model

from lfm_mlx.cache import ConvState, KVCache, QuantizedKVCache, State
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import ContextLengthError, OptionError

CONFIG = ModelConfig.from_dict(tiny_config(max_position_embeddings=64))


def test_a_state_has_one_layer_state_a_layer_of_the_right_kind_and_dtype():
    state = State.empty(CONFIG, 3, dtype=mx.bfloat16)
    assert [type(layer) for layer in state.layers] == [ConvState, KVCache, ConvState, KVCache]
    assert state.lengths == (0, 0, 0)
    assert {array.dtype for array in state.arrays} == {mx.bfloat16}
    assert [array.shape for array in state.layers[0].arrays] == [(3, 1, 1, 32)] * 2
    assert state.layers[1].keys.shape == (3, 2, 0, 8)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_state_of_no_rows_is_refused(batch_size):
    with pytest.raises(OptionError, match=f"batch_size is {batch_size}, expected at least 1"):
        State.empty(CONFIG, batch_size)


def test_lengths_count_real_tokens_and_a_call_beyond_the_context_is_refused_without_effect():
    state = State.empty(CONFIG, 2)
    state.advance(state.begin(10, [10, 4]))
    assert state.lengths == (10, 4)
    state.advance(state.begin(54, [54, 0]))
    assert state.lengths == (64, 4)
    with pytest.raises(ContextLengthError, match="a row would hold 65 tokens, expected at most 64"):
        state.begin(1)
    assert state.lengths == (64, 4)
    state.keep([1])
    assert state.begin(1).starts == (4,)


def test_reserve_makes_room_in_every_attention_layer_and_nowhere_else():
    state = State.empty(CONFIG)
    conv_bytes = sum(layer.num_bytes for layer in state.layers if isinstance(layer, ConvState))
    state.reserve(40)
    assert [layer.capacity for layer in state.layers if isinstance(layer, KVCache)] == [256, 256]
    assert state.num_bytes == conv_bytes + 2 * 2 * (2 * 256 * 8) * 4


def test_reserve_plans_for_every_attention_layer_and_a_later_one_without_a_plan_forgets_it():
    state = State.empty(CONFIG)
    state.reserve(300, planned_len=350)
    attention = [layer for layer in state.layers if isinstance(layer, KVCache)]
    assert [(layer.capacity, layer.planned_len) for layer in attention] == [(512, 350)] * 2
    state.reserve(300)
    assert [(layer.capacity, layer.planned_len) for layer in attention] == [(512, None)] * 2


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_a_state_quantises_its_keys_and_values_and_nothing_else(kv_bits):
    config = ModelConfig.from_dict(tiny_config(head_dim=32))
    state = State.empty(config, 3, dtype=mx.bfloat16, kv_bits=kv_bits)
    assert [type(layer) for layer in state.layers] == [ConvState, QuantizedKVCache, ConvState, QuantizedKVCache]
    assert [layer.bits for layer in state.layers if isinstance(layer, QuantizedKVCache)] == [kv_bits] * 2
    assert {array.dtype for array in state.layers[0].arrays} == {mx.bfloat16}


def test_a_snapshot_holds_the_used_columns_only_and_says_its_bytes(moe_model):
    state = moe_model.new_state(2)
    moe_model(random_tokens(2, 9), state, lengths=[9, 4])
    snapshot = state.snapshot()
    assert snapshot.lengths == (9, 4)
    assert snapshot.num_bytes == 2 * (2 * 2 * 32 * 4) + 2 * (2 * 2 * 2 * 9 * 8 * 4)


def test_a_snapshot_stays_bit_for_bit_the_same_whatever_the_state_does(moe_model):
    state = moe_model.new_state()
    moe_model(random_tokens(1, 30), state)
    snapshot = state.snapshot()
    before = [np.array(array) for layer in snapshot.layers for array in layer]
    for _ in range(2):
        for size in (1, 5, 1, 300):
            moe_model(random_tokens(1, size, seed=size), state)
        mx.eval(state.arrays)
        state.restore(snapshot)
        assert state.lengths == (30,)
    for array, expected in zip((array for layer in snapshot.layers for array in layer), before, strict=True):
        np.testing.assert_array_equal(np.array(array), expected)


def test_control_a_state_that_went_on_holds_other_numbers(moe_model):
    state = moe_model.new_state()
    moe_model(random_tokens(1, 30), state)
    before = [np.array(array) for array in state.layers[0].arrays]
    moe_model(random_tokens(1, 5, seed=5), state)
    assert all((np.array(a) != b).any() for a, b in zip(state.layers[0].arrays, before, strict=True))


def test_rows_of_two_states_join_with_their_lengths(moe_model):
    state, other = moe_model.new_state(), moe_model.new_state(2)
    moe_model(random_tokens(1, 7), state)
    moe_model(random_tokens(2, 5), other, lengths=[5, 2])
    state.join(other)
    assert state.lengths == (7, 5, 2)
    assert state.batch_size == 3
    assert {array.shape[0] for array in state.arrays} == {3}
    state.keep([2, 0])
    assert state.lengths == (2, 7)
    assert {array.shape[0] for array in state.arrays} == {2}


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_checkpoints_of_a_chunk_are_what_a_state_remembers_that_stopped_there(taps):
    model = tiny_model(tiny_config(conv_L_cache=taps))
    tokens = random_tokens(1, 40)
    state = model.new_state()
    state.ask([1, 2, 9, 30, 31, 40, 41, 90])
    for start in (0, 10, 31):
        model(tokens[:, start : {0: 10, 10: 31, 31: 40}[start]], state)
    mx.eval(state.arrays)
    found = state.take_checkpoints()
    assert sorted(found) == [1, 2, 9, 30, 31, 40]
    for length, checkpoint in found.items():
        stopped = model.new_state()
        model(tokens[:, :length], stopped)
        assert checkpoint.shape == (2, taps - 1, 32)
        np.testing.assert_allclose(np.array(checkpoint), np.array(stopped.checkpoint()), atol=1e-5)
    assert not np.allclose(np.array(found[30]), np.array(found[31]), atol=1e-2)
    model(tokens, state)
    assert not state.take_checkpoints()


def test_asking_for_checkpoints_changes_nothing_else(moe_model):
    plain, asked = moe_model.new_state(), moe_model.new_state()
    asked.ask([3, 7, 20])
    logits = [np.array(moe_model(random_tokens(1, 20), state)) for state in (plain, asked)]
    np.testing.assert_array_equal(*logits)
    assert asked.num_bytes == plain.num_bytes + 3 * asked.checkpoint().nbytes
    asked.take_checkpoints()
    for array, expected in zip(asked.arrays, plain.arrays, strict=True):
        np.testing.assert_array_equal(np.array(array), np.array(expected))


def test_a_checkpoint_of_a_row_is_that_row_s(moe_model):
    state = moe_model.new_state(2)
    moe_model(random_tokens(2, 9), state, lengths=[9, 4])
    for row, length in enumerate((9, 4)):
        alone = moe_model.new_state()
        moe_model(random_tokens(2, 9)[row : row + 1, :length], alone)
        np.testing.assert_allclose(np.array(state.checkpoint(row)), np.array(alone.checkpoint()), atol=1e-5)


def test_checkpoints_do_not_keep_each_other_or_their_chunk_in_memory():
    model = tiny_model(tiny_config())
    state = model.new_state()
    state.ask(range(1, 1500))
    model(random_tokens(1, 1500), state)
    mx.eval(state.arrays)
    kept = state.take_checkpoints()[700]
    del state
    before = held_bytes()
    del kept
    assert before - held_bytes() < 40_000


def held_bytes() -> int:
    gc.collect()
    return mx.get_active_memory()


def test_checkpoints_are_asked_of_a_single_row(moe_model):
    with pytest.raises(OptionError, match="checkpoints were asked of a state of 2 rows, expected 1"):
        moe_model.new_state(2).ask([3])


def test_checkpoints_behind_a_place_that_was_gone_back_to_are_gone(moe_model):
    state = moe_model.new_state()
    state.ask([3, 6])
    moe_model(random_tokens(1, 4), state)
    mark = state.mark()
    moe_model(random_tokens(1, 4), state)
    state.rewind(mark)
    assert list(state.take_checkpoints()) == [3]
