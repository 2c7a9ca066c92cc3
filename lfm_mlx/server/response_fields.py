"""The fields of OpenAI's Responses API, and the question they ask."""

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
    OneOf,
    Refused,
    Tagged,
    Text,
    whole,
)
from lfm_mlx.server.generation_fields import (
    EFFORTS,
    ENDING,
    JSON_SCHEMA_FIELDS,
    MEANINGLESS,
    SAMPLING,
    STOP,
    make_constraint,
    read_ending,
    read_sampling,
    read_stop,
)
from lfm_mlx.server.http_errors import ApiError

_STATUS = OneOf("in_progress", "completed", "incomplete")
_PLAIN = Fields({"type": Text(), "text": Text()}, required=["text"])
_WRITTEN = Fields(
    {"type": Text(), "text": Text(), "annotations": ListOf(AnyObject(), max_len=0), "logprobs": ListOf(AnyObject())},
    required=["text"],
)
_CONTENT = Either(
    Text(),
    ListOf(
        Tagged(
            "type", {"input_text": _PLAIN, "output_text": _WRITTEN, "text": _PLAIN}, advice="this model reads text only"
        )
    ),
)


def _item(required: Sequence[str], **fields: FieldType) -> Fields:
    return Fields({"type": Text(), "id": Text(), "status": _STATUS, **fields}, required=required)


_ITEM = Tagged(
    "type",
    {
        "message": _item(
            ["role", "content"],
            role=OneOf("system", "developer", "user", "assistant"),
            content=_CONTENT,
            phase=OneOf("commentary", "final_answer"),
        ),
        "function_call": _item(
            ["call_id", "name", "arguments"], call_id=Text(min_len=1), name=Text(min_len=1), arguments=Text()
        ),
        "function_call_output": _item(["call_id", "output"], call_id=Text(min_len=1), output=_CONTENT, name=Text()),
        "reasoning": _item(
            [],
            summary=ListOf(_PLAIN),
            content=ListOf(_PLAIN),
            encrypted_content=Refused("give the reasoning as content"),
        ),
    },
    fallback="message",
    advice="this server reads no other items",
)
_TOOL = Tagged(
    "type",
    {
        "function": Fields(
            {
                "type": Text(),
                "name": Text(min_len=1),
                "description": Text(),
                "parameters": AnyObject(),
                "strict": Flag(),
            },
            required=["name"],
        )
    },
    advice="this server runs no tools itself",
)
_TOOL_CHOICE = Either(
    OneOf("auto", "none", "required"),
    Tagged("type", {"function": Fields({"type": Text(), "name": Text(min_len=1)}, required=["name"])}),
)
_FORMAT = Tagged(
    "type",
    {
        "text": Fields({"type": Text()}),
        "json_object": Fields({"type": Text()}),
        "json_schema": Fields({"type": Text(), **JSON_SCHEMA_FIELDS}, required=["schema"]),
        "regex": Fields({"type": Text(), "regex": Text(min_len=1)}, required=["regex"]),
        "choice": Fields({"type": Text(), "choice": ListOf(Text(min_len=1), min_len=1)}, required=["choice"]),
        "grammar": Fields({"type": Text(), "grammar": Text(min_len=1)}, required=["grammar"]),
    },
)

RESPONSES = Fields(
    {
        "model": Text(),
        "input": Either(Text(), ListOf(_ITEM, min_len=1)),
        "instructions": Text(),
        "previous_response_id": Text(min_len=1),
        **SAMPLING,
        **ENDING,
        **MEANINGLESS,
        "max_output_tokens": whole(1),
        "stop": STOP,
        "stream": Flag(),
        "stream_options": Fields({"include_obfuscation": OneOf(False)}),
        "store": Flag(),
        "tools": ListOf(_TOOL),
        "tool_choice": _TOOL_CHOICE,
        "parallel_tool_calls": Flag(),
        "text": Fields({"format": _FORMAT, "verbosity": OneOf("medium", advice="this model knows no other")}),
        "reasoning": Fields({"effort": OneOf(*EFFORTS), "summary": OneOf("auto", "concise", "detailed")}),
        "thinking_budget": whole(0),
        "chat_template_kwargs": AnyObject(),
        # Some clients always send an empty list.
        "include": ListOf(Refused("nothing is added to an answer, and reasoning is in it in full, as content")),
        "truncation": OneOf("disabled", advice="nothing is cut out of a conversation here"),
        "background": OneOf(False, advice="every answer is waited for"),
        "max_tool_calls": Refused("this server runs no tools itself"),
        "conversation": Refused("give previous_response_id"),
        "prompt": Refused("give instructions and input"),
    },
    required=["input"],
)


def read_question(fields: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()) -> Ask:
    """The question that a request's fields ask.

    Args:
        fields: checked.
        before: the messages of the conversation that it continues.

    Raises:
        ApiError: a format cannot be enforced, or fields contradict one another.
    """
    opening = [{"role": "system", "content": fields["instructions"]}] if fields.get("instructions") else []
    choice = fields.get("tool_choice", "auto")
    effort = fields.get("reasoning", {}).get("effort")
    if "thinking_budget" in fields and effort is not None:
        raise ApiError(
            "thinking_budget and reasoning.effort were given, expected one of them; leave one out",
            param="thinking_budget",
        )
    return Ask(
        messages=[*opening, *before, *read_items(fields["input"])],
        tools=[_tool(tool) for tool in fields.get("tools", [])],
        tool_choice=choice if isinstance(choice, str) else choice["name"],
        is_parallel=fields.get("parallel_tool_calls", True),
        form=_form(fields.get("text", {}).get("format", {"type": "text"})),
        sampling=read_sampling(fields),
        max_tokens=fields.get("max_output_tokens"),
        stop=read_stop(fields),
        **read_ending(fields),
        thinking_budget=fields.get("thinking_budget", EFFORTS[effort or "high"]),
        variables=fields.get("chat_template_kwargs", {}),
    )


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _form(given: Mapping[str, Any]) -> Constraint | None:
    kind = given["type"]
    return make_constraint(kind, given if kind == "json_schema" else given.get(kind), f"text.format.{kind}")


def read_items(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Input items as messages in OpenAI's older form: reasoning, words and calls of one answer are one message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    is_open = False
    for item in items:
        kind = item["type"]
        is_own = kind in ("reasoning", "function_call") or item.get("role") == "assistant"
        if is_own and (not is_open or _begins_anew(messages[-1], kind)):
            messages.append({"role": "assistant", "content": ""})
        if kind == "reasoning":
            messages[-1]["reasoning_content"] = _text(item.get("content") or item.get("summary") or [])
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
        elif is_own:
            messages[-1]["content"] += _text(item["content"])
        else:
            messages.append({"role": item["role"], "content": _text(item["content"])})
        is_open = is_own
    return messages


def _begins_anew(message: Mapping[str, Any], kind: str) -> bool:
    """Whether an item after this message of the assistant belongs to the next one."""
    if kind == "reasoning":
        return True
    return kind == "message" and bool(message["content"])


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
