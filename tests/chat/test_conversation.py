"""`Chat`: what it remembers, what it computes, how turns end. Answers are scripted unless a test says otherwise."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pydantic
import pytest
import scripted_model
from scripted_model import Script
from tokenizer import lfm_templates

from lfm_mlx import load
from lfm_mlx.cache import Transcript
from lfm_mlx.chat import Chat, ChatEvent, Reply, ToolResult, TurnDone, render_prompt, tool
from lfm_mlx.engine.batch import Batch
from lfm_mlx.errors import CheckpointError, LfmError, OptionError, TemplateError
from lfm_mlx.model import Passage
from lfm_mlx.step import Stepper
from lfm_mlx.types import ContentDelta, ReasoningDelta, SamplingParams, ToolCall, ToolCallDone, ToolCallFailed

TINY = scripted_model.TINY
needs_tiny = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="examples/tiny has no weights")


def get_weather(city: str) -> dict[str, Any]:
    """Get the weather in a city."""
    return {"city": city, "temperature": 18}


def call_of(city: str, thought: str = "I look.") -> str:
    return f'<think>{thought}</think><|tool_call_start|>[get_weather(city="{city}")]<|tool_call_end|>'


def say(text: str, thought: str = "Easy.") -> str:
    return f"<think>{thought}</think>{text}"


def roles(chat: Chat) -> list[str]:
    return [message["role"] for message in chat.messages]


class Counted:
    """Prompt tokens that went through `Stepper.passage`, and the prompts and states of all rounds of a chat."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_computed = 0
        self.rounds: list[tuple[int, int]] = []
        """Of each round: tokens computed, and those that no longest common beginning could have spared."""
        passage, reuse = Stepper.passage, Transcript.reuse

        def counted(stepper: Stepper, state: Any, tokens: mx.array, counts: Any = None) -> Passage:
            self.num_computed += tokens.size
            return passage(stepper, state, tokens, counts)

        def noted_reuse(transcript: Transcript, prompt: Any) -> int:
            self.close_round()
            pairs = enumerate(zip(transcript.ids, prompt, strict=False))
            num_shared = next((i for i, (a, b) in pairs if a != b), min(len(transcript.ids), len(prompt)))
            self._num_new = len(prompt) - num_shared
            return reuse(transcript, prompt)

        self._num_new: int | None = None
        monkeypatch.setattr(Stepper, "passage", counted)
        monkeypatch.setattr(Transcript, "reuse", noted_reuse)
        # Forced tokens of an answer are computed so too; here they go one by one, as drawn ones do.
        monkeypatch.setattr(Batch, "_fast_forward", lambda batch, stepper, logits: logits)

    def close_round(self) -> None:
        if self._num_new is not None:
            self.rounds.append((self.num_computed, self._num_new))
        self.num_computed = 0


CITIES = ("Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo")
KEPT = {"preserve_thinking": True}


@pytest.mark.parametrize(
    ("template", "variables", "num_turns"),
    [
        (None, {}, 6),
        (None, KEPT, 6),
        (None, {"enable_thinking": False}, 4),
        (lfm_templates.LFM2, {}, 4),
        (lfm_templates.LFM25, {}, 4),
        (lfm_templates.LFM25_MOE.replace(lfm_templates._DATE, ""), {}, 4),
        (lfm_templates.HARDENED, {}, 4),
        (lfm_templates.HARDENED, KEPT, 4),
    ],
    ids=["stripped", "kept", "no-thinking", "lfm2", "lfm2.5", "lfm2.5-moe", "opened-stripped", "opened-kept"],
)
def test_turns_with_tools_compute_only_what_is_new_and_end_like_a_cold_run(
    monkeypatch: pytest.MonkeyPatch, template: str | None, variables: dict[str, Any], num_turns: int
) -> None:
    # Every other city is asked for by a call, written in quotes that the template does not use.
    is_opened = template == lfm_templates.HARDENED
    cities = CITIES[:num_turns]
    texts = [
        text for i, city in enumerate(cities) for text in ([call_of(city)] if i % 2 else []) + [say(f"18 in {city}.")]
    ]
    if is_opened:
        texts = [text.removeprefix("<think>") for text in texts]
    if "enable_thinking" in variables:
        texts = [text.rpartition("</think>")[2] for text in texts]
    Script(monkeypatch, texts)
    counted = Counted(monkeypatch)
    chat = scripted_model.chat(template, tools=[get_weather], template_variables=variables)
    for city in cities:
        chat.send(f"How warm is {city}?")
    counted.close_round()
    assert len(counted.rounds) == len(texts) == num_turns * 3 // 2
    assert [computed for computed, _ in counted.rounds] == [new for _, new in counted.rounds]
    total_len = len(render_prompt(chat.tokenizer, chat.messages, tools=chat.tools, **variables).ids)
    num_computed = sum(computed for computed, _ in counted.rounds)
    print(f"{num_computed} prompt tokens computed in {len(texts)} rounds; the conversation has {total_len}")
    if variables == KEPT or template == lfm_templates.LFM2:
        assert num_computed < total_len  # Nothing is stripped, so answers are not computed again.

    transcript = chat._transcript
    logits = np.array(chat.model(mx.array([[5]]), transcript.state))[0, -1]
    cold = np.array(chat.model(mx.array([[*transcript.ids, 5]])))[0, -1]
    assert np.abs(logits - cold).max() <= 1e-5 * np.abs(cold).max()
    other = np.array(chat.model(mx.array([[*transcript.ids[:-3], 5]])))[0, -1]
    assert np.abs(logits - other).max() > 1e-2 * np.abs(cold).max()


def test_without_marks_inside_calls_the_thoughts_before_them_are_computed_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of the test above."""
    Script(monkeypatch, [call_of("Paris"), say("18.")])
    counted = Counted(monkeypatch)
    monkeypatch.setattr(Transcript, "mark_answer", lambda transcript: None)
    scripted_model.chat(tools=[get_weather]).send("How warm is Paris?")
    counted.close_round()
    (_, _), (computed, new) = counted.rounds
    assert computed > new + 5


@needs_tiny
def test_turns_of_the_trained_model_compute_only_what_is_new_and_end_like_a_cold_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Counted(monkeypatch)
    called: list[str] = []

    def get_weather(city: str) -> dict[str, Any]:
        """Get the current weather in a city."""
        called.append(city)
        return {"temperature": 18, "condition": "sunny"}

    model, tokenizer = load(TINY)
    chat = Chat(
        model,
        tokenizer,
        tools=[get_weather],
        max_tokens=60,
        sampling=SamplingParams(),
        template_variables={"enable_thinking": False},
    )
    usages = [chat.send("What's the weather in Paris?" if turn % 2 else "Hello").usage for turn in range(4)]
    counted.close_round()
    assert "Paris" in called
    assert [computed for computed, _ in counted.rounds] == [new for _, new in counted.rounds]
    assert sum(usage.prompt_tokens - usage.cached_tokens for usage in usages) == sum(c for c, _ in counted.rounds)
    print([computed for computed, _ in counted.rounds], sum(usage.prompt_tokens for usage in usages))
    logits = np.array(model(mx.array([[5]]), chat._transcript.state))[0, -1]
    cold = np.array(model(mx.array([[*chat._transcript.ids, 5]])))[0, -1]
    assert np.abs(logits - cold).max() <= 1e-5 * np.abs(cold).max()


def test_an_edited_message_costs_what_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [say("One."), say("Two."), say("Three.")])
    counted = Counted(monkeypatch)
    chat = scripted_model.chat(template_variables=KEPT)
    chat.send("First question, and a long one")
    chat.send("Second question")
    assert chat.undo() == "Second question"
    assert roles(chat) == ["user", "assistant"]
    reply = chat.send("Second question, asked in another way")
    counted.close_round()
    prompt = render_prompt(chat.tokenizer, chat.messages[:-1], **KEPT)
    first = render_prompt(chat.tokenizer, chat.messages[:2], add_generation_prompt=False, **KEPT)
    assert counted.rounds[-1][0] == len(prompt.ids) - len(first.ids)
    assert reply.usage.cached_tokens == len(first.ids)
    assert reply.content == "Three."


class Stopwatch:
    """Tells when an answer has begun, from inside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.is_reached = threading.Event()
        method: Callable[..., Any] = getattr(Stepper, name)

        def noted(*args: Any) -> Any:
            self.is_reached.set()
            time.sleep(0.002)
            return method(*args)

        monkeypatch.setattr(Stepper, name, noted)


@pytest.mark.parametrize("place", ["passage", "decode_and_sample"])
def test_a_turn_cancelled_from_another_thread_ends_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    chat = scripted_model.chat(sampling=SamplingParams(temperature=1.0, seed=1, logit_bias={7: -100.0}))
    monkeypatch.setattr("lfm_mlx.engine.engine.prefill_chunk_tokens", lambda config, dtype: 16)
    replies: list[Reply] = []
    place_reached = Stopwatch(monkeypatch, place)
    question = "long question " * (100 if place == "passage" else 1)
    thread = threading.Thread(target=lambda: replies.append(chat.send(question)))
    thread.start()
    assert place_reached.is_reached.wait(30)
    time.sleep(0.02)
    chat.cancel()
    thread.join(30)
    (reply,) = replies
    assert reply.finish_reason == "cancelled"
    assert chat.messages[0]["content"] == question
    if place == "passage":
        assert reply.usage.completion_tokens == 0
        assert roles(chat) == ["user"]
    else:
        assert 0 < reply.usage.completion_tokens < 1000
        assert chat.messages[1:] in ([], [message_of(reply)])
    Script(monkeypatch, [say("Fine.")])
    assert chat.send("And now?").content == "Fine."
    assert_continues_like_a_cold_run(chat)


def message_of(reply: Reply) -> dict[str, Any]:
    thought = {} if reply.reasoning is None else {"reasoning_content": reply.reasoning}
    return {"role": "assistant", "content": reply.content, **thought}


def assert_continues_like_a_cold_run(chat: Chat) -> None:
    transcript = chat._transcript
    logits = np.array(chat.model(mx.array([[5]]), transcript.state))[0, -1]
    cold = np.array(chat.model(mx.array([[*transcript.ids, 5]])))[0, -1]
    assert np.abs(logits - cold).max() <= 1e-5 * np.abs(cold).max()


def test_an_iterator_that_is_dropped_keeps_what_was_written_and_the_next_turn_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Batch, "_fast_forward", lambda batch, stepper, logits: logits)
    Script(monkeypatch, [say("A long answer with many words."), say("Fine.")])
    chat = scripted_model.chat()
    for event in chat.stream("Question"):
        if isinstance(event, ContentDelta):
            break
    gc.collect()
    assert roles(chat) == ["user", "assistant"]
    assert chat.messages[1]["reasoning_content"] == "Easy."
    assert "A long answer with".startswith(chat.messages[1]["content"])
    assert chat.send("Go on").content == "Fine."
    assert_continues_like_a_cold_run(chat)


def test_the_events_of_a_turn_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [call_of("Paris"), say("18 degrees.")])
    chat = scripted_model.chat(tools=[get_weather])
    events = list(chat.stream("How warm is Paris?"))
    kinds = [type(event) for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1] or i == 0] == [
        ReasoningDelta,
        ToolCallDone,
        ToolResult,
        ReasoningDelta,
        ContentDelta,
        TurnDone,
    ]
    (result,) = (event for event in events if isinstance(event, ToolResult))
    assert json.loads(result.content) == {"city": "Paris", "temperature": 18}
    done = events[-1]
    assert isinstance(done, TurnDone)
    assert (done.reply.content, done.reply.reasoning, done.reply.finish_reason) == ("18 degrees.", "Easy.", "stop")
    assert roles(chat) == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[2]["tool_call_id"] == chat.messages[1]["tool_calls"][0]["id"]


class Refused(pydantic.BaseModel):
    """Its schema allows what its validator does not."""

    city: str

    @pydantic.field_validator("city")
    @classmethod
    def _refuse(cls, city: str) -> str:
        raise ValueError("no city is good enough")


def test_a_turn_that_fails_leaves_the_messages_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [say("Hello."), "too long"])
    chat = scripted_model.chat(tools=[get_weather])
    chat.send("Hi")
    before = list(chat.messages)
    with pytest.raises(LfmError, match=r"room|context|prompt"):
        chat.send("word " * 5000)
    assert chat.messages == before
    with pytest.raises(OptionError, match="schema is a int"):
        chat.send("Hi", schema=5)
    with pytest.raises(TemplateError):
        chat.send(5)  # type: ignore[arg-type]
    assert chat.messages == before
    Script(monkeypatch, [call_of("Paris"), "too long", '{"city": "Rome"}', say("Good.")])
    # A result that no context holds: the round that calls is taken back with the one that fails.
    monkeypatch.setattr("lfm_mlx.chat.tool_runner.FunctionTool.call", lambda *_: "word " * 5000)
    with pytest.raises(LfmError):
        chat.send("How warm is Paris?")
    assert chat.messages == before
    with pytest.raises(pydantic.ValidationError, match="good enough"):
        chat.send("A city", schema=Refused)
    assert chat.messages == before
    assert chat.send("Still there?").content == "Good."
    assert_continues_like_a_cold_run(chat)


def test_two_turns_at_a_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [say("Hello.")])
    chat = scripted_model.chat()
    events = chat.stream("Hi")
    next(events)
    with pytest.raises(OptionError, match="another turn"):
        chat.send("Me too")
    assert [type(event) for event in events][-1] is TurnDone
    assert roles(chat) == ["user", "assistant"]


def test_rounds_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [call_of("Paris"), call_of("Rome"), call_of("Oslo"), say("Done.")])
    chat = scripted_model.chat(tools=[get_weather], max_rounds=3)
    reply = chat.send("How warm is it?")
    assert reply.finish_reason == "max_rounds"
    assert [call.arguments for call in reply.tool_calls] == [{"city": "Oslo"}]
    assert roles(chat) == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    chat.add_tool_result(reply.tool_calls[0], "cold")
    assert chat.send().content == "Done."


def test_time_ends_a_turn_in_the_prompt_in_an_answer_and_after_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = scripted_model.chat(time_limit_s=0)
    assert chat.send("Hi").finish_reason == "time_limit"
    assert roles(chat) == ["user"]

    monkeypatch.setattr("lfm_mlx.engine.engine.prefill_chunk_tokens", lambda config, dtype: 16)
    looping: dict[str, Any] = {"sampling": SamplingParams(logit_bias={400: 1000.0}), "guards_loops": False}
    scripted_model.chat(max_tokens=4, **looping).send("warm up")
    chat = scripted_model.chat(time_limit_s=0.5, **looping)
    started_s = time.monotonic()
    assert chat.send("Hi").finish_reason == "time_limit"
    assert time.monotonic() - started_s < 10
    assert roles(chat) == ["user", "assistant"]

    def think(city: str) -> str:
        """Take long."""
        time.sleep(0.5)
        return city

    Script(monkeypatch, [call_of("Rome").replace("get_weather", "think"), say("Late.")])
    scripted_model.chat().send("warm up")
    Script(monkeypatch, [call_of("Rome").replace("get_weather", "think"), say("Late.")])
    chat = scripted_model.chat(time_limit_s=0.4, tools=[think])
    reply = chat.send("Hi")
    assert reply.finish_reason == "time_limit"
    assert roles(chat)[:3] in (["user", "assistant", "tool"], ["user", "assistant"], ["user"])


def test_an_answer_that_is_whole_is_no_victim_of_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [say("In time.")])
    chat, wait = scripted_model.chat(time_limit_s=1.0), threading.Event()
    for event in chat.stream("Hi"):
        if isinstance(event, ContentDelta):
            wait.wait(1.2)  # The caller is slow once; the model has ended its turn.
            wait.set()
    assert isinstance(event, TurnDone)
    assert (event.reply.content, event.reply.finish_reason) == ("In time.", "stop")


def failing(city: str) -> str:
    """Fail."""
    raise RuntimeError(f"no sensor in {city}")


async def slow(city: str) -> dict[str, Any]:
    """Wait and answer."""
    await asyncio.sleep(0.01)
    return {"city": city}


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def failing_twice(city: str) -> str:
    """Fail."""
    raise SpeechlessError


@pytest.mark.parametrize(
    ("function", "content", "is_error"),
    [
        (failing, "Error: RuntimeError: no sensor in Paris", True),
        (failing_twice, "Error: SpeechlessError: it has no text", True),
        (slow, '{"city": "Paris"}', False),
        (get_weather, '{"city": "Paris", "temperature": 18}', False),
    ],
)
def test_results_and_errors_of_tools_go_back_to_the_model(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], content: str, is_error: bool
) -> None:
    Script(monkeypatch, [call_of("Paris").replace("get_weather", function.__name__), say("I see.")])
    chat = scripted_model.chat(tools=[function])
    (result,) = (event for event in chat.stream("Well?") if isinstance(event, ToolResult))
    assert (result.content, result.is_error) == (content, is_error)
    assert chat.messages[2]["content"] == content
    assert chat.messages[-1]["content"] == "I see."


@pytest.mark.parametrize(("value", "text"), [(None, "null"), ([1, "a"], '[1, "a"]'), ("é\udce9", "é\\udce9")])
def test_a_tool_may_return_anything(monkeypatch: pytest.MonkeyPatch, value: Any, text: str) -> None:
    def answer() -> Any:
        """Answer."""
        return value

    Script(monkeypatch, ["<|tool_call_start|>[answer()]<|tool_call_end|>", say("I see.")])
    chat = scripted_model.chat(tools=[answer])
    chat.send("Well?")
    assert chat.messages[2]["content"] == text


@pytest.mark.parametrize("is_confirmed", [True, False])
def test_a_tool_that_changes_something_asks_first(monkeypatch: pytest.MonkeyPatch, is_confirmed: bool) -> None:
    asked: list[ToolCall] = []
    deleted: list[str] = []

    @tool(changes=True)
    def delete(name: str) -> str:
        """Delete a file."""
        deleted.append(name)
        return "deleted"

    def confirm(call: ToolCall) -> bool:
        asked.append(call)
        return is_confirmed

    script = ["<|tool_call_start|>[delete(name='a'), get_weather(city='Rome')]<|tool_call_end|>", say("Well.")]
    Script(monkeypatch, script)
    chat = scripted_model.chat(tools=[delete, get_weather], confirm=confirm)
    results = [event for event in chat.stream("Delete a") if isinstance(event, ToolResult)]
    assert [call.name for call in asked] == ["delete"]
    assert deleted == (["a"] if is_confirmed else [])
    assert [result.is_error for result in results] == [not is_confirmed, False]
    assert results[0].content == ("deleted" if is_confirmed else "The user declined this call.")


@pytest.mark.parametrize(
    "block", ["[get_forecast(city='Rome')]", "[get_weather(town='Rome')]", "[get_weather(city=Rome)]"]
)
def test_a_call_that_cannot_be_run_is_handed_back_with_the_reason(monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    Script(monkeypatch, [f"<|tool_call_start|>{block}<|tool_call_end|>", call_of("Rome"), say("18.")])
    chat = scripted_model.chat(tools=[get_weather])
    events = list(chat.stream("How warm is Rome?"))
    (failed,) = (event for event in events if isinstance(event, ToolCallFailed))
    assert roles(chat) == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert failed.error.message in chat.messages[2]["content"]
    assert chat.messages[-1]["content"] == "18."
    assert chat.undo() == "How warm is Rome?"


def test_calls_are_left_to_the_caller_where_one_is_no_function_or_it_wants_so(monkeypatch: pytest.MonkeyPatch) -> None:
    definition = {"name": "get_time", "description": "d", "parameters": {"type": "object", "properties": {}}}
    both = "<|tool_call_start|>[get_weather(city='Rome'), get_time()]<|tool_call_end|>"
    for script, options in [
        (both, {"tools": [get_weather, definition]}),
        (call_of("Rome"), {"tools": [get_weather], "executes_tools": False}),
    ]:
        Script(monkeypatch, [script, say("Noted.")])
        chat = scripted_model.chat(**options)
        reply = chat.send("Well?")
        assert reply.finish_reason == "tool_calls"
        assert reply.tool_calls[0].arguments == {"city": "Rome"}
        assert roles(chat) == ["user", "assistant"]
        for call in reply.tool_calls:
            chat.add_tool_result(call, "18")
        assert chat.send().content == "Noted."


def test_cancelling_between_tools_runs_no_further_one_and_asks_the_model_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def note(city: str) -> str:
        """Note a city."""
        ran.append(city)
        chat.cancel()
        return "noted"

    Script(monkeypatch, ["<|tool_call_start|>[note(city='Rome'), note(city='Oslo')]<|tool_call_end|>", say("No.")])
    chat = scripted_model.chat(tools=[note])
    reply = chat.send("Note them")
    assert (reply.finish_reason, ran) == ("cancelled", ["Rome"])
    assert roles(chat) == ["user", "assistant", "tool", "tool"]
    assert chat.messages[-1]["content"] == "The user stopped before this call was run."
    assert chat.send("Well?").content == "No."


def test_tools_may_come_from_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [call_of("Rome"), say("18.")])
    chat = scripted_model.chat(tools=(function for function in [get_weather]))
    assert chat.send("Well?").content == "18."
    assert len(chat.tools) == 1


@needs_tiny
@pytest.mark.parametrize("tool_choice", ["required", "get_time", "none"])
def test_the_choice_of_a_tool_binds_the_model(tool_choice: str) -> None:
    def get_time(zone: str) -> str:
        """Get the time."""
        return "noon"

    model, tokenizer = load(TINY)
    chat = Chat(
        model,
        tokenizer,
        tools=[get_weather, get_time],
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        executes_tools=False,
        max_tokens=60,
        thinking_budget=8,
        sampling=SamplingParams(temperature=1.0, seed=3),
    )
    names = {call.name for _ in range(2) for call in ask_again(chat)}
    expected = {"required": {"get_weather", "get_time"}, "get_time": {"get_time"}, "none": set()}[tool_choice]
    assert names <= expected
    assert bool(names) is (tool_choice != "none")


def ask_again(chat: Chat) -> tuple[ToolCall, ...]:
    chat.messages = []
    reply = chat.send("What's the weather in Paris?")
    assert len(reply.tool_calls) <= 1
    return reply.tool_calls


@needs_tiny
def test_the_tiny_model_calls_a_tool_and_answers() -> None:
    chat = Chat(*load(TINY), tools=[get_weather], sampling=SamplingParams(), max_tokens=80)
    events = list(chat.stream("What's the weather in Paris?"))
    (result,) = (event for event in events if isinstance(event, ToolResult))
    assert (result.call.name, result.call.arguments) == ("get_weather", {"city": "Paris"})
    assert chat.messages[-1]["content"]
    quick = Chat(*load(TINY), sampling=SamplingParams(), template_variables={"enable_thinking": False}, max_tokens=60)
    assert quick.send("Hello").reasoning is None


def conversation_of(chat: Chat) -> list[str]:
    return [chat.send(question).content for question in ("One?", "Two?", "Three?")]


def test_two_chats_in_two_threads_on_one_model_answer_as_each_alone() -> None:
    def chats() -> list[Chat]:
        samplings = [SamplingParams(temperature=0.9, seed=seed) for seed in (1, 2)]
        return [scripted_model.chat(max_tokens=12, sampling=sampling, system=f"{sampling}") for sampling in samplings]

    alone = [conversation_of(chat) for chat in chats()]
    together: list[list[str]] = [[], []]
    threads = [
        threading.Thread(target=lambda i=i, chat=chat: together.__setitem__(i, conversation_of(chat)))
        for i, chat in enumerate(chats())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert alone[0] != alone[1]


def test_a_saved_chat_goes_on_as_it_would_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Script(monkeypatch, [call_of("Málaga"), say("18."), say("A."), say("A.")])
    chat, other = (scripted_model.chat(tools=[get_weather], system="Be brief.") for _ in range(2))
    chat.send("How warm is Málaga?")
    chat.save(tmp_path / "chat.json")
    other.load(str(tmp_path / "chat.json"))
    assert other.messages == chat.messages
    for one in (chat, other):
        one.send("Sure?")
    assert other._transcript.ids == chat._transcript.ids
    assert_continues_like_a_cold_run(other)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    chat.reset()
    assert roles(chat) == ["system"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", '{"messages": []}', '{"format": "lfm_mlx chat 1"}', "\udcff", None]
    + [json.dumps({"format": "lfm_mlx chat 1", "messages": messages}) for messages in (5, [5], [{}], {"role": "user"})],
)
def test_a_damaged_file_is_refused_and_the_messages_stay(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "chat.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    chat = scripted_model.chat(system="Be brief.")
    with pytest.raises(CheckpointError, match=r"chat\.json"):
        chat.load(path)
    assert roles(chat) == ["system"]


def test_a_turn_is_taken_back_as_text_and_a_reset_keeps_what_the_system_says() -> None:
    chat = scripted_model.chat()
    system = [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be kind."}]
    parts = [{"type": "text", "text": "Hello."}, {"type": "text", "text": "Who are you?"}]
    chat.messages = [*system, {"role": "user", "content": parts}, {"role": "assistant", "content": "Me."}]
    assert chat.undo() == "Hello.\nWho are you?"
    assert chat.undo() is None
    chat.messages.append({"role": "user", "content": [{"type": "image_url"}]})
    with pytest.raises(TemplateError, match="image_url"):
        chat.undo()
    assert len(chat.messages) == 3
    chat.reset()
    assert chat.messages == system


def test_what_cannot_be_saved_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    chat = scripted_model.chat(system="Be brief.")
    chat.save(tmp_path / "chat.json")
    before = (tmp_path / "chat.json").read_text()
    with pytest.raises(OptionError, match="cannot be written"):
        chat.save(tmp_path / "no" / "chat.json")
    with pytest.raises(OptionError, match="NUL"):
        chat.save("a\0b")
    for content in (object(), "\ud800", float("nan")):
        chat.messages.append({"role": "user", "content": content})
        with pytest.raises(OptionError, match="JSON form"):
            chat.save(tmp_path / "chat.json")
        chat.messages.pop()
    assert (tmp_path / "chat.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_async_tools_run_in_the_loop_of_asend(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> Reply:
        loop = asyncio.get_running_loop()

        async def find(city: str) -> bool:
            """Find a city."""
            await asyncio.sleep(0.01)
            return asyncio.get_running_loop() is loop

        Script(monkeypatch, [call_of("Rome").replace("get_weather", "find"), say("Found.")])
        chat = scripted_model.chat(tools=[find])
        reply = await chat.asend("Find Rome")
        assert chat.messages[2]["content"] == "true"
        return reply

    assert asyncio.run(talk()).content == "Found."


@pytest.mark.parametrize("way", ["asend", "astream", "tool", "at once"])
def test_cancelling_the_task_cancels_the_turn_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    async def wait(city: str) -> str:
        """Wait for ever."""
        started.set()
        await asyncio.sleep(3600)
        return city

    async def stream(chat: Chat) -> None:
        async for _ in chat.astream("Tell me"):
            pass

    async def talk() -> Chat:
        if way == "tool":
            Script(monkeypatch, [call_of("Rome").replace("get_weather", "wait")])
        chat = scripted_model.chat(tools=[wait], sampling=SamplingParams(logit_bias={400: 1000.0}), guards_loops=False)
        work = stream(chat) if way == "astream" else chat.asend("Tell me")
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        while way != "at once" and not started.is_set() and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)
        return chat

    started = threading.Event()
    if way in ("asend", "astream"):
        started = Stopwatch(monkeypatch, "decode").is_reached
    chat = asyncio.run(talk())
    Script(monkeypatch, [say("Fine.")])
    assert chat.send("And now?").content == "Fine."
    assert roles(chat)[0] == "user"
    assert_continues_like_a_cold_run(chat)


def test_leaving_an_asynchronous_stream_ends_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "_fast_forward", lambda batch, stepper, logits: logits)

    async def talk() -> list[ChatEvent]:
        seen = []
        events = chat.astream("Tell me")
        async for event in events:
            seen.append(event)
            if isinstance(event, ContentDelta):
                break
        await events.aclose()  # type: ignore[attr-defined]
        return [*seen, *[event async for event in chat.astream("Again")]]

    Script(monkeypatch, [say("A long answer with many words."), say("Fine.")])
    chat = scripted_model.chat()
    seen = asyncio.run(talk())
    assert isinstance(seen[-1], TurnDone)
    assert seen[-1].reply.content == "Fine."
    assert roles(chat) == ["user", "assistant", "user", "assistant"]


def test_options_are_checked_when_a_chat_is_made() -> None:
    for options in ({"max_rounds": 0}, {"time_limit_s": -1}, {"max_tokens": 0}, {"thinking_budget": -1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            scripted_model.chat(**options)
    with pytest.raises(OptionError, match="tool_choice is 'find'"):
        scripted_model.chat(tools=[get_weather], tool_choice="find")
    with pytest.raises(OptionError, match="no tools"):
        scripted_model.chat(tool_choice="required")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    deadline_s = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threading.active_count() <= before
