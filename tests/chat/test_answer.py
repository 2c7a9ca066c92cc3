"""One answer: stop strings, budgets, loops, limits, and what is reported about it."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import scripted_model
from scripted_model import Script
from tokenizer import lfm_templates

from lfm_mlx.chat import Answer, AnswerOptions, render_prompt
from lfm_mlx.chat import answer as module
from lfm_mlx.constrain import JsonSchema
from lfm_mlx.engine import EngineThread
from lfm_mlx.engine.batch import Batch
from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.loop_guard import LoopGuard
from lfm_mlx.types import ContentDelta, ReasoningDelta, SamplingParams

USER = {"role": "user", "content": "Well?"}
LOOPING = SamplingParams(logit_bias={400: 1000.0})
"""Makes the random model write one token again and again."""


def answer(
    template: str | None = None,
    *,
    engine: EngineThread | None = None,
    on_progress: Callable[[], None] | None = None,
    **options: Any,
) -> Answer:
    tokenizer = scripted_model.tokenizer(template)
    return Answer(
        scripted_model.model(),
        tokenizer,
        render_prompt(tokenizer, [USER]),
        options=AnswerOptions(**options),
        engine=engine,
        on_progress=on_progress,
    )


def finished(one: Answer) -> Answer:
    for _ in one:
        pass
    return one


def reasoning_of(one: Answer) -> list[int]:
    """The tokens between the markers."""
    tokenizer = scripted_model.tokenizer()
    ids = one.row.generated
    opened = tokenizer.token_id("<think>")
    start = ids.index(opened) + 1 if opened in ids else 0
    return ids[start : ids.index(tokenizer.token_id("</think>"))]


@pytest.mark.parametrize("is_stepwise", [False, True])
@pytest.mark.parametrize(
    ("stop", "content"),
    [
        ((), "one STOP two"),
        (("STOP",), "one "),
        (("P t",), "one STO"),
        (("wo",), "one STOP t"),
        (("xyz",), "one STOP two"),
    ],
)
def test_stop_strings_end_the_content_and_are_not_looked_for_in_the_reasoning(
    monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...], content: str, is_stepwise: bool
) -> None:
    if is_stepwise:
        monkeypatch.setattr(Batch, "_fast_forward", lambda batch, stepper, logits: logits)
    thought = "STOP, P t, two."
    Script(monkeypatch, [f"<think>{thought}</think>one STOP two"])
    one = answer(stop=stop)
    events = list(one)
    assert (one.output.reasoning, one.output.content, one.finish_reason) == (thought, content, "stop")
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == content
    assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == thought


def test_a_stop_string_drops_the_calls_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one STOP two<|tool_call_start|>[f(a=1)]<|tool_call_end|>"
    Script(monkeypatch, [text, text])
    assert finished(answer(stop=["STOP"])).output.tool_calls == ()
    assert len(finished(answer()).output.tool_calls) == 1


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("template", [None, lfm_templates.HARDENED], ids=["closed", "opened"])
def test_a_thinking_budget_closes_the_reasoning_after_so_many_tokens(template: str | None, budget: int) -> None:
    opened, closed = (scripted_model.tokenizer().token_id(text) for text in ("<think>", "</think>"))
    # The model would open reasoning whenever it may, and never close it.
    bias = {400: 1000.0, closed: -1000.0} | ({opened: 0.0} if template else {})
    sampling = SamplingParams(logit_bias=bias)
    one = answer(template, thinking_budget=budget, sampling=sampling, max_tokens=12, guards_loops=False)
    if template is None:
        one._control._queue.append(opened)
    finished(one)
    assert reasoning_of(one) == [400] * budget
    assert one.usage.reasoning_tokens == budget + 1  # `</think>` itself is one.
    assert one.row.generated[-1] == 400
    assert (one.finish_reason, len(one.row.generated)) == ("length", 12)
    assert one.output.reasoning is not None
    assert one.output.content
    assert not one.output.is_reasoning_open


def test_without_a_budget_the_reasoning_goes_on() -> None:
    one = finished(answer(lfm_templates.HARDENED, sampling=LOOPING, max_tokens=40, guards_loops=False))
    assert one.output.is_reasoning_open
    assert one.output.content == ""
    assert one.usage.reasoning_tokens == 40


@pytest.fixture
def _quick_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LoopGuard", functools.partial(LoopGuard, min_tokens=64))


@pytest.mark.usefixtures("_quick_guard")
def test_the_loop_guard_ends_a_loop_and_without_it_the_loop_goes_on() -> None:
    guarded = finished(answer(sampling=LOOPING, max_tokens=200))
    assert guarded.finish_reason == "repetition"
    assert 64 < guarded.usage.completion_tokens < 120
    free = finished(answer(sampling=LOOPING, max_tokens=180, guards_loops=False))
    assert (free.finish_reason, free.usage.completion_tokens) == ("length", 180)


@pytest.mark.usefixtures("_quick_guard")
def test_a_loop_in_the_reasoning_closes_it_and_only_the_next_one_ends_the_answer() -> None:
    one = finished(answer(lfm_templates.HARDENED, sampling=LOOPING, max_tokens=400))
    assert one.finish_reason == "repetition"
    assert not one.output.is_reasoning_open
    assert one.output.content
    assert 64 < one.usage.reasoning_tokens < 120
    assert 128 < one.usage.completion_tokens < 240


SCHEMA = {
    "type": "object",
    "properties": {"temperature_in_celsius": {"type": "integer"}, "is_it_raining_now": {"type": "boolean"}},
    "required": ["temperature_in_celsius", "is_it_raining_now"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_are_fast_forwarded_are_those_that_steps_would_give(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=5, repetition_penalty=1.2, top_k=50)
    options = {"constraint": JsonSchema(SCHEMA, reasoning="forbidden"), "sampling": sampling, "max_tokens": 60}
    fast = finished(answer(**options))
    num_passes = 0
    decode_step = Batch._step_masked

    def counted(batch: Batch, stepper: Any) -> None:
        nonlocal num_passes
        num_passes += 1
        decode_step(batch, stepper)

    monkeypatch.setattr(Batch, "_step_masked", counted)
    assert finished(answer(**options)).row.generated == fast.row.generated
    num_fast_passes, num_passes = num_passes, 0
    monkeypatch.setattr(Batch, "_fast_forward", lambda batch, stepper, logits: logits)
    slow = finished(answer(**options))
    assert slow.row.generated == fast.row.generated
    assert (slow.finish_reason, slow.output) == (fast.finish_reason, fast.output)
    assert num_fast_passes < num_passes
    other = finished(answer(**{**options, "sampling": SamplingParams(temperature=2.0, seed=6)}))
    assert other.row.generated != fast.row.generated


def test_log_probabilities_are_those_of_the_tokens_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = scripted_model.tokenizer()
    text = "<think>Easy.</think>one two STOP three"
    for stop, shown in ((), text), (("STOP",), "<think>Easy.</think>one two "):
        Script(monkeypatch, [text])
        one = finished(answer(stop=stop, top_logprobs=2))
        ids = [token.token_id for token in one.logprobs]
        assert tokenizer.decode(ids).startswith(shown.rstrip())
        assert len(tokenizer.decode(ids[:-1])) < len(shown) <= len(tokenizer.decode(ids))
        assert all(len(token.top) == 2 and token.logprob <= token.top[0][1] <= 0 for token in one.logprobs)
    Script(monkeypatch, [text])
    assert finished(answer()).logprobs == []


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 9])
def test_forced_tokens_count_as_generated_ones(max_tokens: int) -> None:
    one = finished(answer(constraint=JsonSchema(SCHEMA, reasoning="forbidden"), max_tokens=max_tokens))
    assert (one.usage.completion_tokens, one.finish_reason, one.is_cut) == (max_tokens, "length", True)


def test_a_cancelled_answer_says_so_and_keeps_what_it_has() -> None:
    one = answer(sampling=LOOPING, max_tokens=200)
    events = [next(one) for _ in range(3)]
    one.cancel()
    events += list(one)
    assert one.finish_reason == "cancelled"
    assert len(one.row.generated) < 10
    assert one.output.content == "".join(event.text for event in events if isinstance(event, ContentDelta))


def test_answers_in_a_shared_engine_are_those_of_engines_of_their_own() -> None:
    engine = EngineThread(scripted_model.model(), max_rows=3)
    sampling = SamplingParams(temperature=1.0, seed=3)
    kinds: list[dict[str, Any]] = [
        {"sampling": sampling, "max_tokens": 30},
        {"constraint": JsonSchema(SCHEMA, reasoning="forbidden"), "sampling": sampling, "max_tokens": 60},
        {"sampling": LOOPING, "max_tokens": 25, "stop": [scripted_model.tokenizer().decode([400, 400])]},
        {"sampling": SamplingParams(temperature=1.5, seed=4, repetition_penalty=1.1), "max_tokens": 20},
    ]
    expected = [finished(answer(**kind)) for kind in kinds]
    news = threading.Semaphore(0)
    taken = answer(engine=engine, on_progress=news.release, **kinds[0])
    iterated = [answer(engine=engine, **kind) for kind in kinds[1:]]
    events = []
    while taken.finish_reason is None:
        assert news.acquire(timeout=120)
        events += taken.take()
    for one in iterated:
        finished(one)
    engine.close()
    for own, shared in zip(expected, [taken, *iterated], strict=True):
        assert (shared.row.generated, shared.output) == (own.row.generated, own.output)
        assert (shared.usage, shared.finish_reason) == (own.usage, own.finish_reason)
    text = "".join(event.text for event in events if isinstance(event, ContentDelta))
    assert text == taken.output.content
    assert expected[2].finish_reason == "stop"


def test_an_answer_that_nobody_will_read_leaves_the_engine() -> None:
    engine = EngineThread(scripted_model.model())
    ended = threading.Event()
    one = answer(engine=engine, on_progress=ended.set, max_tokens=3000, guards_loops=False, sampling=LOOPING)
    row = one.row
    del one
    gc.collect()
    engine.close(timeout_s=120)
    assert row.finish_reason == "cancelled"
    assert len(row.generated) < 3000


def test_a_budget_needs_a_vocabulary_with_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm_mlx.chat.answer.reasoning_tokens", lambda tokenizer: None)
    with pytest.raises(OptionError, match="thinking_budget"):
        answer(thinking_budget=5)
    assert finished(answer(max_tokens=3)).finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "name"),
    [({"max_tokens": 0}, "max_tokens"), ({"thinking_budget": -1}, "thinking_budget"), ({"stop": [""]}, "stop")],
)
def test_options_are_checked_at_once(options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match=name):
        AnswerOptions(**options)
