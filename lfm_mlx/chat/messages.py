"""OpenAI-style messages to the prompt of a checkpoint, through whatever its chat template understands."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, TypeVar

from lfm_mlx.chat.functions import as_tools
from lfm_mlx.errors import OptionError, TemplateError
from lfm_mlx.parsing.render import render_calls
from lfm_mlx.tokenizer import Tokenizer, opens_reasoning, special
from lfm_mlx.types import Message, Tool, ToolCall

_T = TypeVar("_T")

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_CALL_MARKERS: Final = frozenset((special.TOOL_CALL_START, special.TOOL_CALL_END))
_OWN_MARKERS: Final = _CALL_MARKERS | {special.THINK_START, special.THINK_END}
"""What the model itself writes within a turn; in its own past turns these stay control tokens."""

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


@dataclass(frozen=True, kw_only=True)
class RenderedPrompt:
    """A prompt as text and as ids, and whether the answer begins inside `<think>`.

    Encoding `text` gives `ids` unless a message or a tool quotes a special token; then only `ids` are safe.
    """

    text: str
    ids: tuple[int, ...]
    opens_reasoning: bool


class PreparedChat(NamedTuple):
    """Messages and tools as a template takes them; `sources` are the indices of the messages that they came from."""

    messages: list[Message]
    tools: list[Tool] | None
    sources: list[int]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A checked message. `rest` is what only a template may understand, such as `name` and `tool_call_id`."""

    index: int
    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    rest: Mapping[str, Any] = field(default_factory=dict)


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Iterable[object] | None = None,
    add_generation_prompt: bool = True,
    **variables: object,
) -> RenderedPrompt:
    """The prompt for a conversation.

    What users, tool results, tool definitions and arguments quote of special tokens, such as `<|im_end|>`, is encoded
    as plain text. System messages are the caller's own words: special tokens there are special.

    Args:
        tokenizer: with a chat template; what the template can do is found out once and remembered on this object.
        messages: in OpenAI's form.
        tools: whatever `as_tools` takes.
        add_generation_prompt: whether the prompt ends where the assistant's answer begins.
        variables: further variables of the template.

    Raises:
        TemplateError: a message cannot be rendered; the text names its index.
        OptionError: a tool is malformed.
    """
    turns = read_turns(messages)
    listed = as_tools(tools or ())

    def render(shaper: _Shaper) -> str:
        chat = shaper.shape(turns, listed)
        try:
            return tokenizer.render(
                chat.messages, tools=chat.tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except TemplateError as error:
            raise TemplateError(_with_sources(str(error), chat.sources)) from error

    shaper = _Shaper(tokenizer, has_tools=bool(listed))
    text = render(shaper)
    if not shaper.quotes:
        ids = tokenizer.encode(text, add_bos=False)
    else:
        mark = next(mark for n in itertools.count() if (mark := f"cut{n}x") not in text)
        pieces = render(_Shaper(tokenizer, has_tools=bool(listed), mark=mark)).split(mark)
        if "".join(pieces) != text:
            raise TemplateError(
                f"{shaper.quotes[0]}, which the chat template reads or changes, expected plain text; leave it out"
            )
        ids = _encode_apart(tokenizer, pieces)
    return RenderedPrompt(text=text, ids=tuple(ids), opens_reasoning=opens_reasoning(text))


def prepare_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Iterable[object] | None = None
) -> PreparedChat:
    """Messages and tools in the form that `tokenizer.render` takes; the caller's own are left as they are.

    Raises:
        TemplateError: a message cannot be rendered; the text names its index.
        OptionError: a tool is malformed.
    """
    listed = as_tools(tools or ())
    return _Shaper(tokenizer, has_tools=bool(listed)).shape(read_turns(messages), listed)


def template_abilities(tokenizer: Tokenizer, *, has_tools: bool = False) -> TemplateAbilities:
    """What the chat template can do; `has_tools` tells apart checkpoints with a template of its own for tools."""
    if not tokenizer.has_template:
        tokenizer.render([{"role": "user", "content": ""}])  # raises, and says what is missing
    return remembered(tokenizer, f"abilities {has_tools}", lambda: _probe(tokenizer, has_tools))


def call_block(calls: Iterable[ToolCall], special_strings: Iterable[str] = ()) -> str:
    """Calls as LFM2 writes them, `<|tool_call_start|>[f(a='x')]<|tool_call_end|>`; parsing gives the same calls back.

    Special tokens that arguments quote are written with an escape, so that they stay text.

    Args:
        calls: with JSON arguments.
        special_strings: the special tokens of the tokenizer, beyond those that every LFM2 has.

    Raises:
        OptionError: a function's name cannot be written.
    """
    quotes = QuotedTokens({*special_strings, *_known_strings()})
    inside = render_calls(calls).removeprefix(special.TOOL_CALL_START).removesuffix(special.TOOL_CALL_END)
    return f"{special.TOOL_CALL_START}{quotes.escape(inside)}{special.TOOL_CALL_END}"


def _probe(tokenizer: Tokenizer, has_tools: bool) -> TemplateAbilities:
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
    thought = render(user, answer | dict.fromkeys(_REASONING_KEYS, "probe_thought"), tool=tool)
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


def _known_strings() -> list[str]:
    return [value for name, value in vars(special).items() if name.isupper()]


def special_strings(tokenizer: Tokenizer) -> frozenset[str]:
    """The strings that `tokenizer.encode` makes control tokens of."""
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
    texts = (tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)
    return frozenset(
        text for text in (*texts, *_known_strings()) if len(text) > 1 and tokenizer.token_id(text) is not None
    )


class QuotedTokens:
    """Finds special tokens in text that only quotes them."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = frozenset(strings)
        self._lengths = sorted({len(string) for string in self._strings}, reverse=True)
        first = sorted({re.escape(string[0]) for string in self._strings})
        self._starts = re.compile("|".join(first) or "(?!)")

    def find(self, text: str, keep: frozenset[str] = frozenset()) -> list[tuple[int, str]]:
        """Where special tokens stand and which; those in `keep` are left out."""
        found = []
        for match in self._starts.finditer(text):
            at = match.start()
            string = next((text[at : at + n] for n in self._lengths if text[at : at + n] in self._strings), None)
            if string is not None and string not in keep:
                found.append((at, string))
        return found

    def escape(self, literal: str) -> str:
        """A text of Python or JSON literals whose strings hold no special tokens, and mean the same."""
        for at, string in reversed(self.find(literal)):
            literal = f"{literal[:at]}\\u{ord(string[0]):04x}{literal[at + 1 :]}"
        return literal


class _Shaper:
    """Gives turns the form that a template takes.

    Args:
        mark: put into every quoted special token, behind its first character; "" changes nothing.

    Attributes:
        quotes: the special tokens that were quoted, each with its place, in words.
    """

    def __init__(self, tokenizer: Tokenizer, *, has_tools: bool, mark: str = "") -> None:
        self._can = template_abilities(tokenizer, has_tools=has_tools)
        self._strings = remembered(tokenizer, "special strings", lambda: special_strings(tokenizer))
        self._finder = remembered(tokenizer, "quotes", lambda: QuotedTokens(self._strings))
        self._mark = mark
        self.quotes: list[str] = []

    def shape(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> PreparedChat:
        listed: list[Tool] | None = None
        if tools and self._can.tools is None:
            turns = self._with_tool_list(turns, tools)
        elif tools:
            given = tools if self._can.tools == "wrapped" else [tool["function"] for tool in tools]
            listed = [self._apart(tool, f"tools[{index}]") for index, tool in enumerate(given)]
        messages = [self._message(turn, position) for position, turn in enumerate(turns)]
        return PreparedChat(messages, listed, [turn.index for turn in turns])

    def _with_tool_list(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        texts = (json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        listed = f"[{', '.join(map(self._finder.escape, texts))}]"
        if self._can.marks_tool_results and special.TOOL_LIST_START in self._strings:
            listed = f"{special.TOOL_LIST_START}{listed}{special.TOOL_LIST_END}"
        first = turns[0] if turns[0].role == "system" else Turn(index=0, role="system", content="")
        content = "\n".join(filter(None, (first.content, f"List of tools: {listed}")))
        return [replace(first, content=content), *(turn for turn in turns if turn is not first)]

    def _message(self, turn: Turn, position: int) -> Message:
        place = f"messages[{turn.index}]"
        takes_system = self._can.takes_late_system if position else self._can.takes_system
        if turn.role == "system" and not takes_system:
            where = "after other messages" if position else "at all"
            raise TemplateError(
                f"{place} is a system message, which this chat template does not render {where}; "
                f"{'put it first' if position else 'make it part of the first user message'}"
            )
        if turn.role == "tool" and not self._can.takes_tool:
            raise TemplateError(
                f"{place} has the role 'tool', which this chat template does not render; "
                "give the result in a user message"
            )
        content = turn.content
        if turn.role != "system":
            content = self._apart(content, place, _OWN_MARKERS if turn.role == "assistant" else frozenset())
        shaped = {"role": turn.role, **self._apart(dict(turn.rest), place)}
        if turn.calls and self._can.arguments is None:
            content = self._call_text(turn.calls, place) + content
        elif turn.calls:
            shaped["tool_calls"] = [self._call(call, place) for call in turn.calls]
        if turn.reasoning:
            reasoning = self._apart(turn.reasoning, place, _CALL_MARKERS)
            if self._can.reads_reasoning:
                shaped |= dict.fromkeys(_REASONING_KEYS, reasoning)
            else:
                content = f"{special.THINK_START}{reasoning}{special.THINK_END}{content}"
        return {**shaped, "content": parts_of(content) if self._can.wants_parts else content}

    def _call_text(self, calls: Sequence[ToolCall], place: str) -> str:
        try:
            return call_block(calls, self._strings)
        except OptionError as error:
            raise TemplateError(f"{place}.tool_calls cannot be written: {error}; correct the call") from error

    def _call(self, call: ToolCall, place: str) -> dict[str, Any]:
        arguments = self._apart(call.arguments, place)
        if self._can.arguments == "json":
            arguments = json.dumps(arguments, ensure_ascii=False)
        return shaped_call(replace(call, name=self._apart(call.name, place)), arguments)

    def _apart(self, value: Any, place: str, keep: frozenset[str] = frozenset()) -> Any:
        """A copy of a JSON value whose quoted special tokens are cut by the mark."""
        if isinstance(value, str):
            found = self._finder.find(value, keep)
            self.quotes += [f"{place} quotes the special token {string!r}" for _, string in found]
            for at, _ in reversed(found):
                value = value[: at + 1] + self._mark + value[at + 1 :]
            return value
        if isinstance(value, Mapping):
            return {self._apart(key, place): self._apart(item, place, keep) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._apart(item, place, keep) for item in value]
        return value


def shaped_call(call: ToolCall, arguments: Any) -> dict[str, Any]:
    """A call in OpenAI's form."""
    function = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **function} if call.id else function


def parts_of(text: str) -> list[dict[str, str]]:
    """Content as a list of one part."""
    return [{"type": "text", "text": text}]


def _encode_apart(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """The ids of the joined pieces, where no token reaches from one into the next."""
    # A special token in front, left out again, keeps sentencepiece from putting a space before a piece.
    guard = tokenizer.token_id(special.TURN_START)
    guard_text = special.TURN_START if guard is not None else ""
    ids = tokenizer.encode(pieces[0], add_bos=False)
    for piece in pieces[1:]:
        ids += tokenizer.encode(guard_text + piece, add_bos=False)[len(guard_text) > 0 :]
    return ids


def _with_sources(text: str, sources: Sequence[int]) -> str:
    return re.sub(r"(?<=\bmessages\[)\d+(?=\])", lambda match: str(sources[int(match[0])]), text)


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
    own = ("role", "content", "tool_calls", *_REASONING_KEYS)
    rest = {key: value for key, value in message.items() if key not in own and value is not None}
    given = {key: message[key] for key in ("tool_calls", *_REASONING_KEYS) if message.get(key)}
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
    texts = {key: given[key] for key in _REASONING_KEYS if key in given}
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
