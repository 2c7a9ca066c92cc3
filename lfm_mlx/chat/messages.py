"""OpenAI-style messages to the prompt of a checkpoint, through whatever its chat template understands."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from lfm_mlx.chat.functions import as_tools
from lfm_mlx.chat.template_abilities import parts_of, remembered, shaped_call, template_abilities
from lfm_mlx.chat.turns import REASONING_KEYS, Turn, read_turns
from lfm_mlx.errors import OptionError, TemplateError
from lfm_mlx.parsing.render import render_calls
from lfm_mlx.tokenizer import Tokenizer, opens_reasoning, special
from lfm_mlx.types import Message, Tool, ToolCall

_CALL_MARKERS: Final = frozenset((special.TOOL_CALL_START, special.TOOL_CALL_END))
_OWN_MARKERS: Final = _CALL_MARKERS | {special.THINK_START, special.THINK_END}
"""What the model itself writes within a turn; in its own past turns these stay control tokens."""


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


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Iterable[object] | None = None,
    add_generation_prompt: bool = True,
    max_tokens: int | None = None,
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
        max_tokens: refuse a prompt that is far longer, by its beginning alone.
        variables: further variables of the template.

    Raises:
        TemplateError: a message cannot be rendered; the text names its index.
        OptionError: a tool is malformed.
        ContextLengthError: see `Tokenizer.check_length`.
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
    if max_tokens is not None:
        tokenizer.check_length(text, max_tokens)
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


def call_block(calls: Iterable[ToolCall], special_strings: Iterable[str] = ()) -> str:
    """Calls as LFM2 writes them, `<|tool_call_start|>[f(a='x')]<|tool_call_end|>`; parsing gives the same calls back.

    Special tokens that arguments quote are written with an escape, so that they stay text.

    Args:
        calls: with JSON arguments.
        special_strings: the special tokens of the tokenizer, beyond those that every LFM2 has.

    Raises:
        OptionError: a function's name cannot be written.
    """
    quotes = QuotedTokens({*special_strings, *known_strings()})
    inside = render_calls(calls).removeprefix(special.TOOL_CALL_START).removesuffix(special.TOOL_CALL_END)
    return f"{special.TOOL_CALL_START}{quotes.escape(inside)}{special.TOOL_CALL_END}"


def known_strings() -> list[str]:
    """The marker strings of all LFM generations, whether or not a tokenizer has them."""
    return [value for name, value in vars(special).items() if name.isupper()]


def special_strings(tokenizer: Tokenizer) -> frozenset[str]:
    """The strings that `tokenizer.encode` makes control tokens of."""
    texts = (tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.special_ids)
    return frozenset(
        text for text in (*texts, *known_strings()) if len(text) > 1 and tokenizer.token_id(text) is not None
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
        parts, end = [], 0
        for at, string in self.find(literal):
            parts += [literal[end:at], f"\\u{ord(string[0]):04x}"]
            end = at + 1
        return "".join([*parts, literal[end:]])


class _Shaper:
    """Gives turns the form that a template takes.

    Args:
        mark: put into every quoted special token, behind its first character; "" changes nothing.

    Attributes:
        quotes: which values quote special tokens, each with its place and the first of them, in words.
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
        if not self._can.takes_system and turns[0].role != "system":
            raise TemplateError(
                "tools were given, but this chat template neither lists them nor renders a system message to list them "
                "in; describe them in the first user message"
            )
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
                shaped |= dict.fromkeys(REASONING_KEYS, reasoning)
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
            if not found:
                return value
            self.quotes.append(f"{place} quotes the special token {found[0][1]!r}")
            borders = [0, *(at + 1 for at, _ in found), len(value)]
            return self._mark.join(value[start:end] for start, end in itertools.pairwise(borders))
        if isinstance(value, Mapping):
            return {self._apart(key, place): self._apart(item, place, keep) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._apart(item, place, keep) for item in value]
        return value


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
