"""Chat completions over HTTP, with the embedded checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
from running_server import WEATHER_TOOL, Running


def streamed(served: Running, content: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True, **fields}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]], key: str, index: int = 0) -> str:
    """All pieces of an answer's text put together."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


def test_an_answer_has_content_reasoning_and_true_counts(served: Running) -> None:
    body = served.chat("What is the capital of France?").json()
    (choice,) = body["choices"]
    assert "Paris" in choice["message"]["content"]
    assert choice["message"]["reasoning_content"]
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"]
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_a_stream_says_what_the_whole_answer_says(served: Running) -> None:
    question = "What is the capital of France?"
    message = served.chat(question).json()["choices"][0]["message"]
    chunks = streamed(served, question, stream_options={"include_usage": True})
    assert text_of(chunks, "content") == message["content"]
    assert text_of(chunks, "reasoning_content") == message["reasoning_content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 10
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert [choice["finish_reason"] for chunk in chunks[-2:] for choice in chunk["choices"]] == ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_calls_come_whole_and_as_deltas(served: Running) -> None:
    question = "What's the weather in Paris?"
    choice = served.chat(question, tools=[WEATHER_TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    chunks = streamed(served, question, tools=[WEATHER_TOOL])
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [delta["index"] for delta in deltas] == [0] * len(deltas)
    assert deltas[0]["id"].startswith("call_")
    assert "".join(delta["function"].get("name", "") for delta in deltas) == "get_weather"
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"city": "Paris"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_call_comes_whatever_is_asked(served: Running, choice: object) -> None:
    answer = served.chat("Say hello.", tools=[WEATHER_TOOL], tool_choice=choice).json()["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_no_call_comes_where_none_is_allowed(served: Running) -> None:
    answer = served.chat("What's the weather in Paris?", tools=[WEATHER_TOOL], tool_choice="none").json()
    assert "tool_calls" not in answer["choices"][0]["message"]


@pytest.mark.parametrize(
    ("fields", "is_right"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "x",
                        "schema": {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]},
                    },
                }
            },
            lambda text: json.loads(text)["a"] in ("red", "blue"),
        ),
        ({"response_format": {"type": "json_object"}, "max_tokens": 200}, lambda text: text.lstrip().startswith("{")),
        (
            {"response_format": {"type": "regex", "regex": "[ab]{3}"}},
            lambda text: len(text) == 3 and set(text) <= {*"ab"},
        ),
        ({"response_format": {"type": "choice", "choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
        (
            {"response_format": {"type": "grammar", "grammar": 'start: "x" "y"+'}, "max_tokens": 80},
            lambda text: text.startswith("xy"),
        ),
        ({"guided_choice": ["red", "blue"]}, lambda text: text in ("red", "blue")),
        ({"guided_regex": "[0-9]{4}"}, lambda text: text.isdigit() and len(text) == 4),
    ],
    ids=["json_schema", "json_object", "regex", "choice", "grammar", "guided_choice", "guided_regex"],
)
def test_an_answer_has_the_form_that_was_asked_for(served: Running, fields: dict[str, Any], is_right: Any) -> None:
    answer = served.chat("Say hello.", reasoning_effort="none", **{"max_tokens": 200, **fields}).json()
    assert is_right(answer["choices"][0]["message"]["content"]), answer


def test_with_tools_and_a_format_an_answer_is_a_call_or_has_the_format(served: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}
    fields = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, "tools": [WEATHER_TOOL]}
    called = served.chat("What's the weather in Paris?", **fields).json()["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    assert json.loads(called["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    start = served.service.tokenizer.token_id("<|tool_call_start|>")
    written = served.chat("What's the weather in Paris?", logit_bias={str(start): -100}, **fields).json()["choices"][0]
    assert written["finish_reason"] == "stop"
    assert json.loads(written["message"]["content"])["a"] in ("red", "blue")


def test_several_answers_differ_and_a_seed_repeats_them(served: Running) -> None:
    def contents() -> list[str]:
        body = served.chat("Tell me about Paris.", n=3, seed=7, temperature=3.0, max_tokens=12).json()
        messages = [choice["message"] for choice in body["choices"]]
        return [f"{message.get('reasoning')}|{message['content']}" for message in messages]

    first = contents()
    assert len(set(first)) == 3
    assert contents() == first


def test_several_answers_are_streamed_by_their_index(served: Running) -> None:
    chunks = streamed(served, "What is the capital of France?", n=2)
    texts = [text_of(chunks, "content", index) for index in range(2)]
    assert texts[0] == texts[1] != ""


def test_limits_and_stops_end_an_answer(served: Running) -> None:
    cut = served.chat("What is the capital of France?", max_completion_tokens=5).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 5
    stopped = served.chat("What is the capital of France?", stop=["France"]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"].endswith("of ")
    assert "France" in stopped["message"]["reasoning"]


def test_a_thinking_budget_is_kept(served: Running) -> None:
    usage = served.chat("What is the capital of France?", thinking_budget=4).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] <= 5
    free = served.chat("What is the capital of France?").json()["usage"]
    assert free["completion_tokens_details"]["reasoning_tokens"] > 5


def test_a_bias_is_taken_by_token_id(served: Running) -> None:
    (token_id,) = served.service.tokenizer.encode("Paris", add_bos=False)[:1]
    answer = served.chat("What is the capital of France?", logit_bias={str(token_id): -100}).json()
    assert "Paris" not in json.dumps(answer["choices"])


def test_a_template_variable_reaches_the_template(served: Running) -> None:
    with_date = served.chat("Say hello.", chat_template_kwargs={"date_string": "2026-01-02"}).json()["usage"]
    assert with_date["prompt_tokens"] > served.chat("Say hello.").json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"messages": {}}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "messages[1]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "lost"}]}, "messages[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format.regex"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinknig": False}}, "chat_template_kwargs.enable_thinknig"),
        ({"store": True}, "store"),
        ({"audio": {}}, "audio"),
        ({"functions": []}, "functions"),
        ({"best_of": 2}, "best_of"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_a_field_that_is_wrong_or_not_honoured_is_named(served: Running, fields: dict[str, Any], param: str) -> None:
    response = served.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert param.split("[")[0].split(".")[0] in error["message"]


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(served: Running) -> None:
    response = served.chat("word " * 5000)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "4,096" in response.json()["error"]["message"]
