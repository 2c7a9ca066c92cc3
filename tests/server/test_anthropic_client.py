"""Anthropic's own client against the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from running_server import WEATHER, Running

if TYPE_CHECKING:
    import anthropic
    from anthropic.types import MessageParam

QUESTION = "What's the weather in Paris?"
SETTLED: Any = {"extra_body": {"temperature": 0}}
"""The client's own methods have no temperature any more."""

TOOL: Any = {
    "name": WEATHER["name"],
    "description": WEATHER["description"],
    "input_schema": WEATHER["parameters"],
    "cache_control": {"type": "ephemeral"},
}


@pytest.fixture(scope="module")
def client(served: Running) -> anthropic.Anthropic:
    import anthropic  # takes seconds

    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=60)


def test_a_tool_round_trip(client: anthropic.Anthropic) -> None:
    messages: list[MessageParam] = [{"role": "user", "content": QUESTION}]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "tools": [TOOL], **SETTLED}
    first = client.messages.create(messages=messages, **options)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    call = first.content[1]
    assert call.type == "tool_use"
    assert call.input == {"city": "Paris"}
    counted = client.messages.count_tokens(model="tiny", messages=messages, tools=[TOOL]).input_tokens
    usage = first.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    messages.append({"role": "assistant", "content": first.content})
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 18, "sky": "sunny"}'}
    messages.append({"role": "user", "content": [result]})
    second = client.messages.create(messages=messages, **options)
    assert second.stop_reason == "end_turn"
    assert "18" in second.content[-1].text  # type: ignore[union-attr]


def test_a_stream_is_the_whole_message(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 200,
        **SETTLED,
        "system": [{"type": "text", "text": "You are helpful.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_streamed_calls_are_put_together(client: anthropic.Anthropic) -> None:
    with client.messages.stream(
        model="tiny", max_tokens=200, **SETTLED, tools=[TOOL], messages=[{"role": "user", "content": QUESTION}]
    ) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == {"city": "Paris"}  # type: ignore[union-attr]


def test_thinking_is_limited_or_left_out(client: anthropic.Anthropic) -> None:
    def thoughts(thinking: Any) -> str:
        message = client.messages.create(
            model="tiny",
            max_tokens=200,
            **SETTLED,
            thinking=thinking,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
        )
        return "".join(block.thinking for block in message.content if block.type == "thinking")

    assert thoughts({"type": "disabled"}) == ""
    assert 0 < len(thoughts({"type": "enabled", "budget_tokens": 4})) < len(thoughts({"type": "adaptive"}))


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="tiny",
        max_tokens=200,
        **SETTLED,
        stop_sequences=["Berlin", "France"],
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "France")


def test_a_tool_is_required_and_a_format_is_kept(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 100, **SETTLED, "thinking": {"type": "disabled"}}
    options["messages"] = [{"role": "user", "content": "Say hello."}]
    called = client.messages.create(tools=[TOOL], tool_choice={"type": "any"}, **options)
    assert called.stop_reason == "tool_use"
    schema = {"type": "object", "properties": {"a": {"enum": ["red"]}}, "required": ["a"]}
    shaped = client.messages.create(output_config={"format": {"type": "json_schema", "schema": schema}}, **options)
    assert '"red"' in shaped.content[-1].text  # type: ignore[union-attr]


def test_errors_have_the_types_of_the_client(client: anthropic.Anthropic) -> None:
    import anthropic

    messages: list[MessageParam] = [{"role": "user", "content": "x"}]
    with pytest.raises(anthropic.NotFoundError, match="expected 'tiny'"):
        client.messages.create(model="claude", max_tokens=5, messages=messages)
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="tiny", max_tokens=0, messages=messages)
    error: Any = caught.value.body
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["request_id"] == caught.value.response.headers["x-request-id"]
    assert client.models.list().data[0].id == "tiny"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages[1]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"n": 2}, "n is no field"),
    ],
)
def test_a_field_that_is_not_honoured_is_named(served: Running, fields: dict[str, object], named: str) -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], **fields}
    response = served.http.post("/v1/messages", json=body)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]["message"]
