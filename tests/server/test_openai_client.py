"""OpenAI's own client against the server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import pytest
from pydantic import BaseModel
from running_server import WEATHER, WEATHER_TOOL, Running

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionMessageParam

QUESTION = "What's the weather in Paris?"
RESULT = '{"temperature": 18, "sky": "sunny"}'


class Colour(BaseModel):
    name: Literal["red", "blue"]
    is_dark: bool


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    import openai  # takes seconds

    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_a_tool_round_trip(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    first = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER_TOOL], temperature=0)  # type: ignore[list-item]
    message = first.choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages.append(message.model_dump(exclude_none=True))  # type: ignore[arg-type]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    second = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER_TOOL], temperature=0)  # type: ignore[list-item]
    assert second.choices[0].finish_reason == "stop"
    assert "18" in (second.choices[0].message.content or "")
    assert second.usage is not None
    assert second.usage.prompt_tokens > 80


def test_the_stream_helper_puts_calls_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        tools=[{"type": "function", "function": {**WEATHER, "strict": True}}],  # type: ignore[list-item]
        temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == {"city": "Paris"}


def test_an_answer_is_parsed_into_a_pydantic_model(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "Name a colour."}],
        response_format=Colour,
        reasoning_effort="none",
        max_tokens=100,
        temperature=0,
    )
    assert isinstance(completion.choices[0].message.parsed, Colour)


def test_errors_have_the_types_of_the_client(client: openai.OpenAI) -> None:
    import openai

    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.chat.completions.create(model="gpt-9", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    assert caught.value.param == "temperature"
    assert client.models.list().data[0].id == "tiny"
    assert client.models.retrieve("alias").id == "alias"


def test_a_response_is_continued_by_its_id(client: openai.OpenAI) -> None:
    import openai

    tool = {"type": "function", **WEATHER, "strict": True}
    first = client.responses.create(model="tiny", input=QUESTION, tools=[tool], temperature=0)  # type: ignore[list-item]
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call = first.output[1]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Paris"}
    second = client.responses.create(
        model="tiny",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": RESULT}],
        tools=[tool],  # type: ignore[list-item]
        temperature=0,
    )
    assert second.status == "completed"
    assert "18" in second.output_text
    by_hand = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": QUESTION},
            *(item.model_dump(exclude_none=True) for item in first.output),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": call.call_id, "output": RESULT},
        ],
        tools=[tool],  # type: ignore[list-item]
        temperature=0,
        store=False,
    )
    assert by_hand.output_text == second.output_text
    assert by_hand.usage is not None
    assert second.usage is not None
    assert by_hand.usage.input_tokens == second.usage.input_tokens
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(by_hand.id)


def test_a_streamed_response_is_the_whole_one(client: openai.OpenAI) -> None:
    question = "What is the capital of France?"
    whole = client.responses.create(model="tiny", input=question, temperature=0)
    raw = list(client.responses.create(model="tiny", input=question, temperature=0, stream=True))
    with client.responses.stream(model="tiny", input=question, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text != ""
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert whole.output[0].type == "reasoning"
    assert whole.output[0].content is not None
    assert "".join(thoughts) == whole.output[0].content[0].text


def test_streamed_calls_of_a_response_have_their_events(client: openai.OpenAI) -> None:
    tool = {"type": "function", **WEATHER, "strict": True}
    with client.responses.stream(model="tiny", input=QUESTION, tools=[tool], temperature=0) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    assert "response.function_call_arguments.done" in kinds
    assert final.output[1].type == "function_call"
    assert final.output[1].parsed_arguments == {"city": "Paris"}


def test_a_response_is_parsed_and_cut_ones_say_so(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="tiny",
        input="Name a colour.",
        text_format=Colour,
        reasoning={"effort": "none"},
        max_output_tokens=100,
        temperature=0,
    )
    assert isinstance(parsed.output_parsed, Colour)
    cut = client.responses.create(model="tiny", input="Say hello.", max_output_tokens=3, temperature=0)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("max_tokens", [3, 20])
def test_the_events_of_a_cut_response_agree_with_it(client: openai.OpenAI, max_tokens: int) -> None:
    ended: list[object] = []
    for event in client.responses.create(
        model="tiny", input="Say hello.", max_output_tokens=max_tokens, temperature=0, stream=True
    ):
        if event.type == "response.output_item.done":
            ended.append(event.item.to_dict())
    assert event.type == "response.incomplete"
    assert ended == [item.to_dict() for item in event.response.output]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "content": [{"text": None}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "reasoning", "summary": [{}]}]}, "input[0].summary[0].text"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"input": "x", "include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"input": "x", "frobnicate": 1}, "frobnicate"),
    ],
)
def test_a_response_field_that_is_not_honoured_is_named(served: Running, fields: dict[str, object], param: str) -> None:
    response = served.http.post("/v1/responses", json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_an_unknown_previous_response_is_not_found(served: Running) -> None:
    response = served.http.post("/v1/responses", json={"input": "x", "previous_response_id": "resp_0"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "previous_response_id"
