from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from chat_checkpoints import chat_config, write_chat_checkpoint

from lfm_mlx import TokenStream, generate, load, stream
from lfm_mlx.engine.prompt_run import PromptRun
from lfm_mlx.errors import ContextLengthError, OptionError
from lfm_mlx.generate.generation import with_overrides
from lfm_mlx.generate.prompt import prompt_ids
from lfm_mlx.load import Loaded
from lfm_mlx.types import SamplingParams

QUESTION = "What is the capital of France?"
RANDOM = {"temperature": 1.0, "seed": 1, "ignore_stop_tokens": True, "max_tokens": 40}
"""Text of 40 tokens without loops."""


@pytest.fixture
def short(tmp_path: Path) -> Loaded:
    """A model with a context of 32 tokens."""
    return load(write_chat_checkpoint(tmp_path, chat_config(max_position_embeddings=32)))


@pytest.fixture(scope="module")
def whole(chat: Loaded) -> str:
    """The text of `RANDOM`, which no stop string ends."""
    return generate(*chat, QUESTION, **RANDOM)


def text_of(tokens: Iterator[Any]) -> str:
    return "".join(token.text for token in tokens)


def ids_of(chat: Loaded, prompt: Any, **options: Any) -> list[int]:
    return [token.id for token in stream(*chat, prompt, **options)]


def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence_computed_anew(chat: Loaded) -> None:
    ids = prompt_ids(*chat, QUESTION)
    num_prompt = len(ids)
    for _ in range(24):
        ids.append(int(mx.argmax(chat.model(mx.array([ids]))[0, -1]).item()))
    options = {"max_tokens": 24, "temperature": 0, "ignore_stop_tokens": True}
    assert ids_of(chat, QUESTION, **options) == ids[num_prompt:]
    assert ids_of(chat, "What is the capital of Spain?", **options) != ids[num_prompt:]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(chat: Loaded) -> None:
    options = {"temperature": 1.5, "max_tokens": 16}
    first = generate(*chat, QUESTION, seed=1, **options)
    assert generate(*chat, QUESTION, seed=1, **options) == first
    assert generate(*chat, QUESTION, seed=2, **options) != first
    assert generate(*chat, QUESTION, **options) != generate(*chat, QUESTION, **options)


def test_a_drawn_seed_is_reported_and_repeats_the_text(chat: Loaded) -> None:
    tokens = stream(*chat, QUESTION, temperature=1.5, max_tokens=30)
    text = text_of(tokens)
    assert generate(*chat, QUESTION, temperature=1.5, max_tokens=30, seed=tokens.statistics.seed) == text


def test_the_models_own_sampling_is_the_default_and_single_values_win(chat: Loaded) -> None:
    assert chat.model.sampling == SamplingParams()
    warm = SamplingParams(temperature=1.5, seed=1)
    text = generate(*chat, QUESTION, sampling=warm, max_tokens=20)
    assert generate(*chat, QUESTION, max_tokens=20) == generate(*chat, QUESTION, temperature=0, max_tokens=20) != text
    assert generate(*chat, QUESTION, sampling=warm, temperature=0, max_tokens=20) != text
    assert generate(*chat, QUESTION, temperature=1.5, seed=1, max_tokens=20) == text


def test_joined_text_is_what_the_tokenizer_makes_of_all_ids(chat: Loaded) -> None:
    tokens = list(stream(*chat, QUESTION, **RANDOM))
    ids = [token.id for token in tokens]
    joined = "".join(token.text for token in tokens)
    assert joined == chat.tokenizer.decode(ids)
    assert joined != "".join(chat.tokenizer.decode([token_id]) for token_id in ids)


def test_special_tokens_can_be_left_out(chat: Loaded) -> None:
    bias = {1: 1e4}
    assert generate(*chat, QUESTION, logit_bias=bias, max_tokens=3) == "<|startoftext|>" * 3
    assert generate(*chat, QUESTION, logit_bias=bias, max_tokens=3, skip_special=True) == ""


@pytest.mark.parametrize("length", [1, 2, 7, 15])
def test_a_stop_string_ends_the_text_wherever_token_borders_fall(chat: Loaded, whole: str, length: int) -> None:
    for start in range(0, len(whole) - length, 25):
        stop = whole[start : start + length]
        tokens = stream(*chat, QUESTION, stop=stop, **RANDOM)
        assert text_of(tokens) == whole[: whole.index(stop)] != whole
        assert tokens.finish_reason == "stop"


def test_a_stop_string_at_the_very_end_is_cut_off_and_named_as_the_reason(chat: Loaded, whole: str) -> None:
    tokens = stream(*chat, QUESTION, stop=[whole[-3:]], **RANDOM)
    assert text_of(tokens) == whole[:-3]
    assert (tokens.finish_reason, len(tokens.generated_ids)) == ("stop", 40)


def test_the_beginning_of_a_stop_string_at_the_very_end_is_text(chat: Loaded, whole: str) -> None:
    tokens = stream(*chat, QUESTION, stop=[whole[-3:] + "never"], **RANDOM)
    assert text_of(tokens) == whole
    assert tokens.finish_reason == "length"


def test_a_stop_string_that_breaks_off_does_not_hide_one_inside_it(chat: Loaded, whole: str) -> None:
    inner, broken = whole[22:24], whole[18:27] + "never"
    assert whole.index(inner) == 22
    assert generate(*chat, QUESTION, stop=[broken, inner], **RANDOM) == whole[:22]
    assert generate(*chat, QUESTION, stop=[broken], **RANDOM) == whole


def test_no_text_of_a_stop_string_is_ever_shown(chat: Loaded, whole: str) -> None:
    shown = ""
    for token in stream(*chat, QUESTION, stop=[whole[30:40]], **RANDOM):
        shown += token.text
        assert whole[:30].startswith(shown)
    assert shown == whole[:30]


def test_a_stop_token_ends_the_text_and_leaves_none(chat: Loaded) -> None:
    tokens = list(stream(*chat, QUESTION, temperature=0))
    assert tokens[-1].id in chat.tokenizer.stop_ids
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    assert "<|im_end|>" not in "".join(token.text for token in tokens)
    further = list(stream(*chat, QUESTION, temperature=0, ignore_stop_tokens=True, max_tokens=len(tokens) + 5))
    assert [token.id for token in further[: len(tokens)]] == [token.id for token in tokens]
    assert len(further) == len(tokens) + 5


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_is_exact_and_named_as_the_reason(chat: Loaded, max_tokens: int) -> None:
    tokens = list(stream(*chat, QUESTION, max_tokens=max_tokens))
    assert len(tokens) == max_tokens
    assert [token.finish_reason for token in tokens] == [None] * (max_tokens - 1) + ["length"]


@pytest.mark.parametrize("max_tokens", [None, 27, 1000])
def test_an_answer_may_use_the_rest_of_the_context_and_no_more(short: Loaded, max_tokens: int | None) -> None:
    tokens = list(stream(*short, [5] * 5, max_tokens=max_tokens, ignore_stop_tokens=True))
    assert len(tokens) == 27
    assert tokens[-1].finish_reason == "length"
    assert len(list(stream(*short, [5] * 5, max_tokens=26, ignore_stop_tokens=True))) == 26


def test_a_prompt_that_fills_the_context_is_refused_and_one_token_less_is_answered(short: Loaded) -> None:
    with pytest.raises(ContextLengthError, match="expected fewer than 32"):
        stream(*short, [5] * 32)
    assert len(list(stream(*short, [5] * 31))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "unknown option temprature; did you mean temperature?"),
        ({"maximum_tokens": 1}, "unknown option maximum_tokens"),
        ({"xyz": 1}, "unknown option xyz, expected one of temperature, top_k"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number of at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2"),
        ({"logit_bias": {320: 1}}, "logit_bias has token id 320"),
        ({"stop": ""}, "stop holds ''"),
        ({"stop": ["a", 5]}, "stop holds 5"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_computed(
    chat: Loaded, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as refused:
        stream(*chat, QUESTION, **options)
    assert message in str(refused.value)


@pytest.mark.parametrize(("wrong", "near"), [("maxtokens", "max_tokens"), ("templat_variables", "template_variables")])
def test_the_nearest_name_is_found_among_all_options(chat: Loaded, wrong: str, near: str) -> None:
    with pytest.raises(OptionError, match=f"unknown option {wrong}; did you mean {near}?"):
        stream(*chat, QUESTION, **{wrong: 1})


def test_overrides_leave_the_other_values() -> None:
    assert with_overrides(SamplingParams(top_k=5), {"seed": 1}) == SamplingParams(top_k=5, seed=1)
    assert with_overrides(SamplingParams(top_k=5), {}) == SamplingParams(top_k=5)


def test_cancelling_from_another_thread_ends_the_answer(chat: Loaded) -> None:
    tokens = stream(*chat, QUESTION, ignore_stop_tokens=True)
    seen = [next(tokens)]
    thread = threading.Thread(target=tokens.cancel)
    thread.start()
    thread.join()
    seen += tokens
    assert len(seen) == 2
    assert (tokens.finish_reason, seen[-1].finish_reason) == ("cancelled", "cancelled")
    uncancelled = list(stream(*chat, QUESTION, ignore_stop_tokens=True, max_tokens=10))
    assert len(uncancelled) == 10


def test_cancelling_in_the_middle_of_a_loop_ends_it_soon(chat: Loaded) -> None:
    tokens = stream(*chat, QUESTION, ignore_stop_tokens=True)
    threading.Timer(0.2, tokens.cancel).start()
    started_s = time.perf_counter()
    seen = list(tokens)
    assert tokens.finish_reason == "cancelled"
    assert 0 < len(seen) < 1000
    assert time.perf_counter() - started_s < 2


def test_cancelling_while_the_prompt_is_read_ends_before_the_first_token(
    chat: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_chunks = 0
    begin_chunk = PromptRun.begin_chunk

    def begin_and_cancel(self: PromptRun, *arguments: Any) -> None:
        nonlocal num_chunks
        num_chunks += 1
        if num_chunks == 3:
            thread = threading.Thread(target=tokens.cancel)
            thread.start()
            thread.join()
        begin_chunk(self, *arguments)

    monkeypatch.setattr(PromptRun, "begin_chunk", begin_and_cancel)
    monkeypatch.setattr("lfm_mlx.engine.engine.prefill_chunk_tokens", lambda *_: 16)
    tokens = stream(*chat, [5] * 160)
    assert list(tokens) == []
    assert tokens.finish_reason == "cancelled"
    assert num_chunks == 3
    uncancelled = stream(*chat, [5] * 160, max_tokens=1)
    num_chunks = 3
    assert len(list(uncancelled)) == 1
    assert num_chunks == 13


def test_a_stream_cancelled_before_it_starts_yields_nothing(chat: Loaded) -> None:
    tokens = stream(*chat, QUESTION)
    tokens.cancel()
    assert list(tokens) == []
    assert tokens.statistics.finish_reason == "cancelled"


def test_statistics_count_and_time_what_happened(chat: Loaded) -> None:
    started_s = time.perf_counter()
    tokens = stream(*chat, QUESTION, max_tokens=20, ignore_stop_tokens=True, seed=5)
    before = tokens.statistics
    assert (before.generated_tokens, before.finish_reason, before.generated_tokens_per_s) == (0, None, 0.0)
    next(tokens)
    assert tokens.statistics.generated_tokens == 1
    assert len(list(tokens)) == 19
    elapsed_s = time.perf_counter() - started_s
    after = tokens.statistics
    assert after.prompt_tokens == len(prompt_ids(*chat, QUESTION))
    assert after.generated_tokens == len(tokens.generated_ids) == 20
    assert (after.finish_reason, after.seed) == ("length", 5)
    assert 0 < after.prompt_s < elapsed_s
    assert 0 < after.generation_s < elapsed_s
    assert after.prompt_s + after.generation_s <= elapsed_s
    assert after.prompt_tokens_per_s == pytest.approx(after.prompt_tokens / after.prompt_s)
    assert after.generated_tokens_per_s == pytest.approx(19 / after.generation_s)
    assert after.peak_memory_bytes >= chat.model.num_bytes


def test_a_stream_that_is_given_up_frees_its_state_at_once(chat: Loaded) -> None:
    gc.collect()
    gc.disable()
    try:
        mx.synchronize()
        before = mx.get_active_memory()
        tokens = stream(*chat, [5] * 1500, ignore_stop_tokens=True)
        next(tokens)
        state_bytes = 1500 * 2 * 2 * 2 * 8 * 4
        assert mx.get_active_memory() - before >= state_bytes
        del tokens
        mx.synchronize()
        assert mx.get_active_memory() - before < state_bytes / 10
    finally:
        gc.enable()


def test_interleaved_streams_do_not_disturb_each_other(chat: Loaded) -> None:
    options = [{"temperature": 0}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.1}]
    prompts = [QUESTION, "Hello"]
    limits = {"max_tokens": 30, "ignore_stop_tokens": True}
    alone = [ids_of(chat, prompt, **one, **limits) for prompt, one in zip(prompts, options, strict=True)]
    streams = [stream(*chat, prompt, **one, **limits) for prompt, one in zip(prompts, options, strict=True)]
    together = [(first.id, second.id) for first, second in zip(*streams, strict=True)]
    assert [list(ids) for ids in zip(*together, strict=True)] == alone
    assert alone[0] != alone[1]


def test_a_stream_is_an_iterator_that_ends_once(chat: Loaded) -> None:
    tokens = stream(*chat, QUESTION, max_tokens=2)
    assert isinstance(tokens, TokenStream)
    assert iter(tokens) is tokens
    assert len(list(tokens)) == 2
    assert list(tokens) == []
