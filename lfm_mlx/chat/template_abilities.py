"""What a chat template makes of messages, found out by rendering small ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from lfm_mlx.chat.turns import REASONING_KEYS
from lfm_mlx.errors import TemplateError
from lfm_mlx.tokenizer import Tokenizer, special
from lfm_mlx.types import Message, Tool, ToolCall

_T = TypeVar("_T")

_PROBE_PARAMETERS: Final = {"properties": {"probe_parameter": {"type": "string", "description": "probe_description"}}}
_PROBE_FUNCTION: Final = {
    "name": "probe_tool",
    "description": "d",
    "parameters": {"type": "object"} | _PROBE_PARAMETERS,
}
_PROBE_ARGUMENTS: Final = {"probe_argument": "probe_value"}


@dataclass(frozen=True, kw_only=True)
class TemplateAbilities:
    """What a chat template makes of messages, found out by rendering small ones.

    Args:
        takes_system, takes_late_system, takes_tool: whether it renders a system message in front, one further on, and
            tool results.
        wants_parts: whether it renders content only as a list of parts.
        arguments: how past tool calls are given to it; None: it drops them.
        tools: how tools are given to it; None: it does not list them as JSON.
        reads_reasoning: whether it renders a field for reasoning; otherwise `<think>` goes into the content.
        marks_tool_results: whether it sets tool results between markers, as the first LFM2 templates do; these have
            markers around the list of tools, too.
    """

    takes_system: bool
    takes_late_system: bool
    takes_tool: bool
    wants_parts: bool
    arguments: Literal["dict", "json"] | None
    tools: Literal["wrapped", "bare"] | None
    reads_reasoning: bool
    marks_tool_results: bool


def template_abilities(tokenizer: Tokenizer, *, has_tools: bool = False) -> TemplateAbilities:
    """What the chat template can do; `has_tools` tells apart checkpoints with a template of its own for tools."""
    if not tokenizer.has_template:
        tokenizer.render([{"role": "user", "content": ""}])  # raises, and says what is missing
    return remembered(tokenizer, f"abilities {has_tools}", lambda: probe_template(tokenizer, has_tools))


def probe_template(tokenizer: Tokenizer, has_tools: bool) -> TemplateAbilities:
    """Find out what a chat template can do by rendering small conversations with it."""
    wrapped, bare = {"type": "function", "function": _PROBE_FUNCTION}, _PROBE_FUNCTION
    user, system, late = ({"role": role, "content": f"probe_{role}"} for role in ("user", "system", "system"))

    def render(*messages: Message, tool: Tool | None = None) -> str:
        given = [{**one, "content": parts_of(one["content"])} for one in messages] if wants_parts else messages
        try:
            return tokenizer.render(given, tools=None if tool is None else [tool], add_generation_prompt=False)
        except TemplateError:
            return ""

    def lists(tool: Tool) -> bool:
        texts = render(user, tool=tool), render(system, user, tool=tool)
        words = ("probe_tool", '"probe_parameter"', "probe_description", "probe_user")
        return all(word in text for word in words for text in texts)

    wants_parts = False
    if "probe_user" not in render(user):
        wants_parts = True
        wants_parts = "probe_user" in render(user)
    tools: Literal["wrapped", "bare"] | None = None
    if has_tools:
        tools = "wrapped" if lists(wrapped) else "bare" if lists(bare) else None
    tool = {"wrapped": wrapped, "bare": bare}[tools] if tools else None
    arguments, call = _probe_calls(lambda call: render(user, call, tool=tool))
    result = render(user, call, {"role": "tool", "content": "probe_result", "tool_call_id": "probe00id"}, tool=tool)
    answer = {"role": "assistant", "content": "probe_answer"}
    thought = render(user, answer | dict.fromkeys(REASONING_KEYS, "probe_thought"), tool=tool)
    return TemplateAbilities(
        takes_system="probe_system" in render(system, user, tool=tool),
        takes_late_system="probe_system" in render(user, answer, late, user, tool=tool),
        takes_tool="probe_result" in result,
        wants_parts=wants_parts,
        arguments=arguments,
        tools=tools,
        reads_reasoning="probe_thought" in thought,
        marks_tool_results=special.TOOL_RESPONSE_START in result,
    )


def _probe_calls(render: Callable[[Message], str]) -> tuple[Literal["dict", "json"] | None, Message]:
    """How past calls are given, and the message that was tried. Python's dict printed is worse than JSON's text."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    shown: dict[Literal["dict", "json"], str] = {}
    forms: dict[Literal["dict", "json"], Any] = {"dict": _PROBE_ARGUMENTS, "json": json.dumps(_PROBE_ARGUMENTS)}
    calls = {
        form: [shaped_call(ToolCall(id="probe00id", name="probe_call", arguments={}), given)]
        for form, given in forms.items()
    }
    for form, given in calls.items():
        text = render({**message, "tool_calls": given})
        if all(word in text for word in ("probe_call", "probe_argument", "probe_value")):
            shown[form] = text
    if not shown:
        return None, message
    is_printed = str(_PROBE_ARGUMENTS) in shown.get("dict", "")
    best: Literal["dict", "json"] = "json" if "json" in shown and (is_printed or "dict" not in shown) else "dict"
    return best, {**message, "tool_calls": calls[best]}


def remembered(tokenizer: Tokenizer, key: str, find: Callable[[], _T]) -> _T:
    """What `find` returned the first time for this tokenizer."""
    answers: dict[str, Any] = vars(tokenizer).setdefault("_chat_answers", {})
    if key not in answers:
        answers[key] = find()
    answer: _T = answers[key]
    return answer


def shaped_call(call: ToolCall, arguments: Any) -> dict[str, Any]:
    """A call in OpenAI's form."""
    function = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **function} if call.id else function


def parts_of(text: str) -> list[dict[str, str]]:
    """Content as a list of one part."""
    return [{"type": "text", "text": text}]
