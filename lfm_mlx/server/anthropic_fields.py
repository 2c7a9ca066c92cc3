"""The fields of Anthropic's Messages API, and the question they ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm_mlx.constrain import Constraint
from lfm_mlx.server.asking import Ask
from lfm_mlx.server.field_types import (
    AnyObject,
    Either,
    Fields,
    FieldType,
    Flag,
    ListOf,
    Number,
    OneOf,
    Refused,
    Tagged,
    Text,
    whole,
)
from lfm_mlx.server.generation_fields import EFFORTS, MAX_STOPS, make_constraint
from lfm_mlx.server.http_errors import ApiError

_CACHE = Fields({"type": OneOf("ephemeral"), "ttl": OneOf("5m", "1h")})
"""Taken and not used: every prompt is cached."""


def _block(required: Sequence[str] = (), **fields: FieldType) -> Fields:
    return Fields({"type": Text(), "cache_control": _CACHE, **fields}, required=required)


_TEXT = _block(["text"], text=Text(), citations=ListOf(AnyObject(), max_len=0))
_TEXTS = Either(Text(), ListOf(Tagged("type", {"text": _TEXT}, advice="this model reads text only")))
_USER_BLOCK = Tagged(
    "type",
    {
        "text": _TEXT,
        "tool_result": _block(["tool_use_id"], tool_use_id=Text(min_len=1), content=_TEXTS, is_error=Flag()),
    },
    advice="this model reads text only",
)
_ASSISTANT_BLOCK = Tagged(
    "type",
    {
        "text": _TEXT,
        "thinking": _block(["thinking"], thinking=Text(), signature=Text()),
        "tool_use": _block(
            ["id", "name", "input"], id=Text(min_len=1), name=Text(min_len=1), input=AnyObject(), caller=AnyObject()
        ),
    },
    advice="this model writes nothing else",
)
_MESSAGE = Tagged(
    "role",
    {
        "user": Fields({"role": Text(), "content": Either(Text(), ListOf(_USER_BLOCK))}, required=["content"]),
        "assistant": Fields(
            {"role": Text(), "content": Either(Text(), ListOf(_ASSISTANT_BLOCK))}, required=["content"]
        ),
    },
    advice="the system's words go into system",
)
_TOOL = Tagged(
    "type",
    {
        "custom": Fields(
            {
                "type": Text(),
                "name": Text(min_len=1),
                "description": Text(),
                "input_schema": AnyObject(),
                "strict": Flag(),
                "cache_control": _CACHE,
                "eager_input_streaming": Flag(),
            },
            required=["name", "input_schema"],
        )
    },
    fallback="custom",
    advice="this server runs no tools itself",
)
_IS_SINGLE: Mapping[str, FieldType] = {"type": Text(), "disable_parallel_tool_use": Flag()}
_TOOL_CHOICE = Tagged(
    "type",
    {
        "auto": Fields(_IS_SINGLE),
        "any": Fields(_IS_SINGLE),
        "tool": Fields({**_IS_SINGLE, "name": Text(min_len=1)}, required=["name"]),
        "none": Fields({"type": Text()}),
    },
)
_DISPLAY = OneOf("summarized", advice="reasoning is shown as it is")
_THINKING = Tagged(
    "type",
    {
        "enabled": Fields({"type": Text(), "budget_tokens": whole(0), "display": _DISPLAY}, required=["budget_tokens"]),
        "adaptive": Fields({"type": Text(), "display": _DISPLAY}),
        "disabled": Fields({"type": Text()}),
    },
)
_FORMAT = Tagged("type", {"json_schema": Fields({"type": Text(), "schema": AnyObject()}, required=["schema"])})
_EFFORT = OneOf("low", "medium", "high", "xhigh", "max")

PROMPT_FIELDS: Mapping[str, FieldType] = {
    "model": Text(),
    "messages": ListOf(_MESSAGE, min_len=1),
    "system": _TEXTS,
    "tools": ListOf(_TOOL),
    "tool_choice": _TOOL_CHOICE,
    "thinking": _THINKING,
    "output_config": Fields({"effort": _EFFORT, "format": _FORMAT}),
    "output_format": _FORMAT,
    "cache_control": _CACHE,
}
"""What a prompt is made of, and what decides it."""

COUNT = Fields(PROMPT_FIELDS, required=["messages"])
MESSAGES = Fields(
    {
        **PROMPT_FIELDS,
        "max_tokens": whole(1),
        "stop_sequences": ListOf(Text(min_len=1), max_len=MAX_STOPS),
        "stream": Flag(),
        "temperature": Number(0),
        "top_p": Number(maximum=1, above=0),
        "top_k": whole(0),
        "metadata": Fields({"user_id": Text()}),
        "service_tier": OneOf("auto", "standard_only"),
        "container": Refused("leave it out"),
        "mcp_servers": Refused("connect to them yourself and give their tools"),
        "context_management": Refused("leave it out"),
    },
    required=["messages", "max_tokens"],
)


def read_question(fields: Mapping[str, Any]) -> Ask:
    """The question that a request's fields ask.

    Raises:
        ApiError: fields contradict one another.
    """
    choice = fields.get("tool_choice", {"type": "auto"})
    named = {"auto": "auto", "any": "required", "none": "none", "tool": choice.get("name", "")}[choice["type"]]
    return Ask(
        messages=read_messages(fields),
        tools=[_tool(tool) for tool in fields.get("tools", [])],
        tool_choice=named,
        is_parallel=not choice.get("disable_parallel_tool_use", False),
        form=_format(fields),
        sampling={name: fields[name] for name in ("temperature", "top_p", "top_k") if name in fields},
        max_tokens=fields.get("max_tokens"),
        stop=tuple(fields.get("stop_sequences", ())),
        thinking_budget=_budget(fields),
    )


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _format(fields: Mapping[str, Any]) -> Constraint | None:
    given = {
        place: one
        for place, one in (
            ("output_config.format", fields.get("output_config", {}).get("format")),
            ("output_format", fields.get("output_format")),
        )
        if one is not None
    }
    if len(given) > 1:
        raise ApiError(
            "output_format and output_config.format were given, expected one; leave one out", param="output_format"
        )
    for place, one in given.items():
        return make_constraint("json_schema", one, f"{place}.schema")
    return None


def _budget(fields: Mapping[str, Any]) -> int | None:
    thinking = fields.get("thinking", {"type": "adaptive"})
    if thinking["type"] == "disabled":
        return 0
    effort = EFFORTS[fields.get("output_config", {}).get("effort", "high")]
    limits = [limit for limit in (thinking.get("budget_tokens"), effort) if limit is not None]
    return min(limits, default=None)


def read_messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages in OpenAI's form.

    Raises:
        ApiError: the last one is the assistant's.
    """
    messages = []
    if system := _text(fields.get("system", "")):
        messages.append({"role": "system", "content": system})
    for message in fields["messages"]:
        messages += _user(message) if message["role"] == "user" else [_assistant(message)]
    if messages[-1]["role"] == "assistant":
        last = len(fields["messages"]) - 1
        raise ApiError(
            f"messages[{last}] is the assistant's, expected the user's: answers are not begun for the model; "
            "leave it out, or ask for a format",
            param=f"messages[{last}]",
        )
    return messages


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _user(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A user's message, its tool results apart: they are messages of their own."""
    content = message["content"]
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in content:
        if block["type"] == "text":
            texts.append(block["text"])
            continue
        if texts:
            messages.append({"role": "user", "content": "\n".join(texts)})
            texts = []
        result = _text(block.get("content", ""))
        if block.get("is_error") and not result.lower().startswith("error"):
            result = f"Error: {result}"
        messages.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": result})
    if texts or not messages:
        messages.append({"role": "user", "content": "\n".join(texts)})
    return messages


def _assistant(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts = [block["text"] for block in content if block["type"] == "text"]
    thoughts = [block["thinking"] for block in content if block["type"] == "thinking"]
    calls = [
        {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": block["input"]}}
        for block in content
        if block["type"] == "tool_use"
    ]
    shaped: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        shaped["reasoning_content"] = "\n".join(thoughts)
    if calls:
        shaped["tool_calls"] = calls
    return shaped
