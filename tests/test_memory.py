"""What a model needs is known before anything is allocated; numbers computed by hand for LFM2.5-8B-A1B."""

from __future__ import annotations

import dataclasses
import re

import mlx.core as mx
import pytest
from random_models import tiny_config, tiny_dense_config

from lfm_mlx import memory
from lfm_mlx.bench.shapes import config_named
from lfm_mlx.cache import State
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import MemoryPlanError, OptionError
from lfm_mlx.memory import (
    MAX_CHUNK_TOKENS,
    MIN_CHUNK_TOKENS,
    MemoryPlan,
    activation_bytes_per_token,
    available_bytes,
    kv_bytes_per_token,
    largest_context,
    plan_memory,
    prefill_chunk_tokens,
    room_for_answer,
    set_memory_limits,
)

BIG = config_named("lfm2.5-8b-a1b")
TINY = ModelConfig.from_dict(tiny_config(head_dim=32))
WEIGHT_BYTES = 4_800_000_000
GB = 10**9


# The parts of a plan.


@pytest.mark.parametrize(
    ("kv_bits", "dtype", "token_bytes"),
    [
        (None, mx.bfloat16, 6 * 2 * 8 * 64 * 2),
        (None, mx.float32, 6 * 2 * 8 * 64 * 4),
        (8, mx.bfloat16, 6 * 2 * 8 * (64 + 8)),
        (4, mx.bfloat16, 6 * 2 * 8 * (32 + 8)),
    ],
    ids=str,
)
def test_a_token_costs_what_its_keys_values_and_scales_take(kv_bits, dtype, token_bytes):
    assert len(BIG.attention_layers) * kv_bytes_per_token(BIG, kv_bits, dtype) == token_bytes
    plan = plan_memory(BIG, weight_bytes=0, context=4096, kv_bits=kv_bits, dtype=dtype)
    assert plan.kv_bytes == 4096 * token_bytes


def test_those_are_12288_6912_and_3840_bytes_a_token():
    layers = len(BIG.attention_layers)
    found = [layers * kv_bytes_per_token(BIG, kv_bits, mx.bfloat16) for kv_bits in (None, 8, 4)]
    assert found == [12_288, 6_912, 3_840]
    assert BIG.kv_bytes_per_token == 12_288


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("context", [1, 256, 300, 2048])
def test_a_plan_counts_what_a_state_of_that_length_holds(context, batch_size, kv_bits):
    plan = plan_memory(TINY, weight_bytes=0, context=context, batch_size=batch_size, kv_bits=kv_bits, dtype=mx.bfloat16)
    state = State.empty(TINY, batch_size, dtype=mx.bfloat16, kv_bits=kv_bits)
    state.reserve(context)
    assert plan.kv_bytes + plan.conv_bytes == state.num_bytes


def test_the_parts_of_a_plan_are_those_computed_by_hand():
    plan = plan_memory(BIG, weight_bytes=WEIGHT_BYTES, context=4000)
    assert plan.kv_bytes == 4096 * 12_288
    assert plan.conv_bytes == 18 * 2 * 2048 * 2
    activations = (4 * (3 * 2048 + 3 * 1792) + 4 * 2048) * 2
    assert activation_bytes_per_token(BIG, mx.bfloat16) == activations
    scores = memory.LIVE_SCORE_ARRAYS * memory.SCORE_BYTES
    assert plan.transient_bytes == 4096 * 2048 + 2048 * activations + 128_000 * 4 * 3 + scores


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_the_parts_of_a_plan_add_up(batch_size, kv_bits):
    plan = plan_memory(BIG, weight_bytes=WEIGHT_BYTES, context=10_000, batch_size=batch_size, kv_bits=kv_bits)
    assert plan.state_bytes == plan.kv_bytes + plan.conv_bytes + plan.transient_bytes
    assert plan.total_bytes == WEIGHT_BYTES + plan.state_bytes
    assert (plan.context, plan.batch_size, plan.kv_bits) == (10_000, batch_size, kv_bits)


def test_rows_multiply_what_each_of_them_takes():
    one, four = (plan_memory(BIG, weight_bytes=WEIGHT_BYTES, context=10_000, batch_size=n) for n in (1, 4))
    assert four.kv_bytes == 4 * one.kv_bytes
    assert four.conv_bytes == 4 * one.conv_bytes
    scores = memory.LIVE_SCORE_ARRAYS * memory.SCORE_BYTES
    assert four.transient_bytes - scores == 4 * (one.transient_bytes - scores)
    assert four.weight_bytes == one.weight_bytes


def test_a_prompt_chunk_is_never_longer_than_the_context():
    options = {"weight_bytes": 0, "context": 100}
    assert plan_memory(BIG, **options, chunk_tokens=2048) == plan_memory(BIG, **options, chunk_tokens=100)
    smaller = plan_memory(BIG, **options, chunk_tokens=99)
    saved = plan_memory(BIG, **options).transient_bytes - smaller.transient_bytes
    assert saved == activation_bytes_per_token(BIG, mx.bfloat16)


def test_a_model_without_attention_needs_neither_keys_nor_scores():
    config = dataclasses.replace(TINY, layer_types=("conv",) * 4)
    plan = plan_memory(config, weight_bytes=0, context=4096)
    assert plan.kv_bytes == 0
    assert plan.transient_bytes < memory.SCORE_BYTES
    assert plan.conv_bytes == 4 * 2 * 32 * 2


@pytest.mark.parametrize(("kv_bits", "config"), [(6, BIG), (8, ModelConfig.from_dict(tiny_config(head_dim=16)))])
def test_a_plan_of_keys_that_no_cache_can_store_is_refused(kv_bits, config):
    with pytest.raises(OptionError, match=r"^kv_bits is"):
        plan_memory(config, weight_bytes=0, context=10, kv_bits=kv_bits)


# Refusals.


def a_plan(**changes: int | None) -> MemoryPlan:
    parts = {"context": 128_000, "batch_size": 2, "kv_bits": None, "weight_bytes": 5 * GB, "kv_bytes": 3 * GB}
    return MemoryPlan(**(parts | {"conv_bytes": GB // 4, "transient_bytes": GB // 2} | changes))


def test_a_plan_that_fits_to_the_byte_is_accepted_and_one_byte_less_is_refused():
    plan = a_plan()
    plan.check(plan.total_bytes, are_weights_loaded=False)
    plan.check(plan.state_bytes, are_weights_loaded=True)
    with pytest.raises(MemoryPlanError):
        plan.check(plan.total_bytes - 1, are_weights_loaded=False)
    with pytest.raises(MemoryPlanError):
        plan.check(plan.state_bytes - 1, are_weights_loaded=True)


def refusal(plan: MemoryPlan, free: int, *, are_weights_loaded: bool) -> str:
    with pytest.raises(MemoryPlanError) as caught:
        plan.check(free, are_weights_loaded=are_weights_loaded)
    return str(caught.value)


def test_a_refusal_says_what_is_needed_for_what_what_is_free_and_what_would_help():
    assert refusal(a_plan(), 8 * GB, are_weights_loaded=False) == (
        "2 x 128,000 tokens need 8.75 GB (weights 5.00 GB, keys and values 3.00 GB, working memory 0.75 GB), expected "
        "at most 8.00 GB, which is what is free; try a shorter context (--max-context) or --kv-bits 8 or weights of "
        "fewer bits"
    )


def test_a_refusal_beside_loaded_weights_does_not_speak_of_them():
    message = refusal(a_plan(), 2 * GB, are_weights_loaded=True)
    assert message.startswith("2 x 128,000 tokens need 3.75 GB (keys and values 3.00 GB, working memory 0.75 GB)")
    assert "weights" not in message


@pytest.mark.parametrize(
    ("kv_bits", "remedies"),
    [(None, ["--kv-bits 8"]), (8, ["--kv-bits 4"]), (4, [])],
    ids=str,
)
def test_the_remedy_is_the_next_fewer_bits_while_there_are_fewer(kv_bits, remedies):
    message = refusal(a_plan(kv_bits=kv_bits), GB, are_weights_loaded=True)
    assert "--max-context" in message
    assert re.findall(r"--kv-bits \d", message) == remedies


# The longest context.


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("free", [GB // 4, GB // 2, 600_000_000, GB, 1_234_567_890, 3 * GB], ids=str)
@pytest.mark.parametrize("config", [BIG, TINY, ModelConfig.from_dict(tiny_dense_config(head_dim=64))])
def test_the_longest_context_fits_and_one_token_more_does_not(config, free, kv_bits):
    def needed(context: int) -> int:
        return plan_memory(config, weight_bytes=0, context=context, kv_bits=kv_bits).state_bytes

    longest = largest_context(config, free, kv_bits=kv_bits)
    assert 0 <= longest <= config.max_context
    assert longest == 0 or needed(longest) <= free
    assert longest == config.max_context or needed(longest + 1) > free


def test_the_longest_context_is_none_the_config_s_or_between():
    assert largest_context(BIG, 1) == 0
    assert largest_context(BIG, 100 * GB) == BIG.max_context == 128_000
    between = [largest_context(BIG, 700_000_000, kv_bits=kv_bits) for kv_bits in (None, 8, 4)]
    assert 0 < between[0] < between[1] < between[2] < 128_000


# Room for an answer.


@dataclasses.dataclass
class MadeUp:
    """A model as far as planning goes."""

    config: ModelConfig = BIG
    max_context: int = 100_000
    dtype: mx.Dtype = mx.bfloat16


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets how many bytes are free."""

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: num_bytes)

    return set_free


def state_bytes(context: int, kv_bits: int | None = None) -> int:
    return plan_memory(BIG, weight_bytes=0, context=context, kv_bits=kv_bits).state_bytes


@pytest.mark.parametrize(
    ("max_tokens", "room"), [(None, 99_000), (1, 1), (500, 500), (99_000, 99_000), (99_001, 99_000), (10**9, 99_000)]
)
def test_with_memory_to_spare_an_answer_has_what_was_asked_for_within_the_context(free, max_tokens, room):
    free(100 * GB)
    assert room_for_answer(MadeUp(), 1000, max_tokens) == room


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_an_answer_without_a_limit_has_what_memory_holds(free, kv_bits):
    free(state_bytes(20_000, kv_bits))
    room = room_for_answer(MadeUp(), 1000, None, kv_bits=kv_bits)
    assert 1000 + room == largest_context(BIG, state_bytes(20_000, kv_bits), kv_bits=kv_bits)
    assert 1000 + room == 20_224  # a whole multiple of 256


def test_the_last_token_that_fits_is_given(free):
    free(state_bytes(20_224))
    assert room_for_answer(MadeUp(), 20_223, None) == 1
    assert room_for_answer(MadeUp(), 20_223, 1) == 1


@pytest.mark.parametrize(("prompt_len", "max_tokens", "told"), [(20_224, None, "20,225"), (50_000, None, "50,001")])
def test_a_prompt_that_leaves_no_memory_for_a_single_token_is_refused(free, prompt_len, max_tokens, told):
    free(state_bytes(20_224))
    with pytest.raises(MemoryPlanError, match=rf"^1 x {told} tokens need .*--max-context.*--kv-bits 8"):
        room_for_answer(MadeUp(), prompt_len, max_tokens)


def test_what_was_asked_for_is_refused_rather_than_cut(free):
    free(state_bytes(20_224))
    assert room_for_answer(MadeUp(), 224, 20_000) == 20_000
    with pytest.raises(MemoryPlanError, match=r"^1 x 20,225 tokens need "):
        room_for_answer(MadeUp(), 224, 20_001)
    assert room_for_answer(MadeUp(), 224, 20_001, kv_bits=8) == 20_001


def test_what_is_cut_to_the_context_anyway_is_judged_by_what_remains(free):
    free(state_bytes(20_224))
    assert room_for_answer(MadeUp(max_context=20_000), 1000, 10**9) == 19_000


# Prompt chunks.


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("config", [BIG, TINY], ids=["big", "tiny"])
@pytest.mark.parametrize("budget", [0, 1, 1 << 20, 10_000_000, 100_000_000, 1 << 28, 1 << 40])
def test_a_prompt_chunk_is_the_largest_power_of_two_within_its_budget_and_bounds(config, dtype, budget):
    chunk, token_bytes = prefill_chunk_tokens(config, dtype, budget), activation_bytes_per_token(config, dtype)
    assert MIN_CHUNK_TOKENS <= chunk <= MAX_CHUNK_TOKENS
    assert chunk.bit_count() == 1
    assert chunk * token_bytes <= budget or chunk == MIN_CHUNK_TOKENS
    assert 2 * chunk * token_bytes > budget or chunk == MAX_CHUNK_TOKENS


def test_the_8b_model_computes_2048_tokens_at_once_in_16_bits_and_1024_in_32():
    assert prefill_chunk_tokens(BIG, mx.bfloat16) == 2048
    assert prefill_chunk_tokens(BIG, mx.float32) == 1024


# What the machine has.


def test_free_bytes_are_those_of_the_gpus_working_set_or_none(monkeypatch):
    monkeypatch.setattr(memory, "_gpu_working_set", lambda: 10 * GB)
    assert available_bytes() == 10 * GB - mx.get_active_memory()
    monkeypatch.setattr(memory, "_gpu_working_set", lambda: 0)
    assert available_bytes() == 0


def test_without_a_gpu_free_bytes_are_those_of_the_host_and_what_mlx_would_reuse(monkeypatch):
    monkeypatch.setattr(memory, "_gpu_working_set", lambda: None)
    monkeypatch.setattr(memory, "_available_host_bytes", lambda: 7 * GB)
    assert available_bytes() == 7 * GB + mx.get_cache_memory()


def test_the_host_has_some_memory():
    assert 1 << 20 < memory._available_host_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("working_set", "num_ranks", "limit"),
    [(None, 1, 16 << 20), (None, 4, 4 << 20), (64 * GB, 1, 512 << 20), (64 * GB, 4, 512 << 20)],
    ids=str,
)
def test_few_freed_buffers_are_kept_and_fewer_on_the_cpu(monkeypatch, working_set, num_ranks, limit):
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    monkeypatch.setattr(mx, "set_wired_limit", lambda _: None)
    monkeypatch.setattr(memory, "_gpu_working_set", lambda: working_set)
    set_memory_limits(a_plan(), num_ranks)
    assert limits == [limit]
