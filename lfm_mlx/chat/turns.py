"""Messages, checked."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lfm_mlx.errors import TemplateError
from lfm_mlx.tokenizer import special
from lfm_mlx.types import Message, ToolCall

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS: Final = ("text", "input_text", "output_text")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A checked message. `rest` is what only a template may understand, such as `name` and `tool_call_id`."""

    index: int
    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    rest: Mapping[str, Any] = field(default_factory=dict)


def read_turns(messages: Sequence[Message]) -> list[Turn]:
    """Checked messages; those of the system in front are one, results stand in the order of their calls.

    Raises:
        TemplateError: a message is malformed; the text names its index.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TemplateError(f"messages is {messages!r:.80}, expected a list with at least one message")
    turns = [_read_turn(f"messages[{index}]", index, message) for index, message in enumerate(messages)]
    _check_results(turns)
    opening = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    if len(opening) > 1:
        merged = replace(opening[0], content="\n\n".join(turn.content for turn in opening))
        turns = [merged, *turns[len(opening) :]]
    return _in_order_of_calls(turns)


def _read_turn(place: str, index: int, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise TemplateError(f'{place} is a {type(message).__name__}, expected a dict like {{"role": "user", ...}}')
    role = message.get("role")
    if role not in _ROLES:
        nearest = difflib.get_close_matches(str(role), _ROLES, 1)
        advice = f"did you mean {nearest[0]!r}?" if nearest else "correct the role"
        raise TemplateError(f"{place} has the role {role!r}, expected one of {', '.join(_ROLES)}; {advice}")
    own = ("role", "content", "tool_calls", *REASONING_KEYS)
    rest = {key: value for key, value in message.items() if key not in own and value is not None}
    given = {key: message[key] for key in ("tool_calls", *REASONING_KEYS) if message.get(key)}
    if "function_call" in rest:
        raise TemplateError(f"{place} has a function_call, expected tool_calls; give the call in a list of them")
    if given and role != "assistant":
        raise TemplateError(
            f"{place} has {next(iter(given))} and the role {role!r}, expected it from the assistant only"
        )
    content = _read_content(place, role, message.get("content"))
    reasoning = _read_reasoning(place, given)
    if role == "assistant" and content.startswith(special.THINK_START) and special.THINK_END in content:
        within, _, content = content.removeprefix(special.THINK_START).partition(special.THINK_END)
        if reasoning and reasoning.strip() != within.strip():
            raise TemplateError(
                f"{place} has reasoning in the content and another beside it, expected one; leave one out"
            )
        reasoning = reasoning or within
    calls = given.get("tool_calls", ())
    if not isinstance(calls, (list, tuple)):
        raise TemplateError(f"{place}: tool_calls is a {type(calls).__name__}, expected a list")
    return Turn(
        index=index,
        role="system" if role == "developer" else role,
        content=content,
        reasoning=reasoning,
        calls=tuple(_read_call(f"{place}.tool_calls[{i}]", call) for i, call in enumerate(calls)),
        rest=rest,
    )


def _read_content(place: str, role: str, content: Any) -> str:
    if content is None and role in ("assistant", "tool"):
        return ""
    if isinstance(content, str):
        return _checked_text(place, content)
    is_list = isinstance(content, (list, tuple))
    if is_list and (role != "tool" or all(isinstance(part, Mapping) and "type" in part for part in content)):
        texts = (_read_part(f"{place}.content[{index}]", part) for index, part in enumerate(content))
        return _checked_text(place, "\n".join(texts))
    if role == "tool":
        return _checked_text(place, _json_text(place, "a result", content))
    raise TemplateError(f"{place}: content is a {type(content).__name__}, expected text; give a string")


def _read_part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise TemplateError(
            f"{place} is a part of type {kind!r}, expected text; this model reads text only, leave it out"
        )
    return text


def _read_reasoning(place: str, given: Mapping[str, Any]) -> str:
    texts = {key: given[key] for key in REASONING_KEYS if key in given}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise TemplateError(f"{place}: {key} is a {type(text).__name__}, expected text; give a string")
    if len(set(texts.values())) > 1:
        raise TemplateError(f"{place}: {' and '.join(texts)} differ, expected one reasoning; leave one out")
    return _checked_text(place, next(iter(texts.values()), ""))


def _read_call(place: str, call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "name": call.name, "arguments": call.arguments}
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise TemplateError(f"{place} is {call!r:.80}, expected a function with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"{place}: arguments is no JSON: {error}; give a dict or its JSON text") from error
    if not isinstance(arguments, Mapping) and arguments is not None:
        raise TemplateError(f"{place}: arguments is a {type(arguments).__name__}, expected an object; give a dict")
    text = _checked_text(place, _json_text(place, "arguments", dict(arguments or {})))
    call_id = call.get("id") or ""
    if not isinstance(call_id, str):
        raise TemplateError(f"{place} has the id {call_id!r:.80}, expected a string; correct the id")
    return ToolCall(id=call_id, name=_checked_text(place, function["name"]), arguments=json.loads(text))


def _json_text(place: str, what: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"{place} has {what} without JSON form: {error}; give JSON values") from error


def _checked_text(place: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"{place} has half a surrogate pair, {text[error.start]!r}, expected Unicode; replace it"
        ) from error
    return text


def _check_results(turns: Sequence[Turn]) -> None:
    known: list[str] = []
    for turn in turns:
        known += [call.id for call in turn.calls]
        answered = turn.rest.get("tool_call_id")
        if turn.role == "tool" and answered is not None and answered not in known and "" not in known:
            raise TemplateError(
                f"messages[{turn.index}] is the result of {answered!r}, expected the id of an earlier call "
                f"({', '.join(map(repr, known)) or 'there is none'}); correct tool_call_id"
            )


def _in_order_of_calls(turns: Sequence[Turn]) -> list[Turn]:
    """Results of one answer's calls in the order of the calls: prompts have no ids to tell them apart."""
    ordered: list[Turn] = []
    order: dict[Any, int] = {}
    for is_result, run in itertools.groupby(turns, lambda turn: turn.role == "tool"):
        if is_result:
            run = iter(sorted(run, key=lambda turn: order.get(turn.rest.get("tool_call_id"), -1)))
        ordered += run
        order = {call.id: number for number, call in enumerate(ordered[-1].calls) if call.id}
    return ordered
