"""What an answer consists of: reasoning, content, tool calls and errors, streamed or from the whole text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lfm_mlx.parsing.router import Router, Span
from lfm_mlx.parsing.schemas import tool_schemas
from lfm_mlx.parsing.tool_calls import new_call_id, read_block
from lfm_mlx.tokenizer.special import THINK_START
from lfm_mlx.types import (
    CallError,
    ContentDelta,
    OutputEvent,
    ReasoningDelta,
    Tool,
    ToolCall,
    ToolCallDone,
    ToolCallFailed,
)


@dataclass(frozen=True, kw_only=True)
class ParsedOutput:
    """An answer, taken apart.

    Args:
        reasoning: what the model thought, None if it did not.
        content: the answer: all text but reasoning, markers and calls, as it was written, whitespace included. Calls
            that cannot be executed stand here too; a block without any executable call stands here with its markers.
        tool_calls: the calls that can be executed, in order.
        errors: why other calls cannot be, in order.
        is_reasoning_open: whether the text ended before `</think>`.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    errors: tuple[CallError, ...]
    is_reasoning_open: bool = False


class OutputStream:
    """Turns an answer into events while it is generated.

    Args:
        tools: the functions the model was given; with them, arguments are coerced and checked. None checks nothing.
        in_reasoning: whether the prompt ended in `<think>`.
        marker_tokens: token id -> marker, for text from which special tokens were left out.
        new_id: makes the ids of calls.

    Raises:
        OptionError: a tool has no name or no proper schema.
    """

    def __init__(
        self,
        tools: Iterable[Tool] | None = None,
        *,
        in_reasoning: bool = False,
        marker_tokens: Mapping[int, str] | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._schemas = None if tools is None else tool_schemas(tools)
        self._router = Router(in_reasoning=in_reasoning)
        self._marker_tokens = dict(marker_tokens or {})
        self._new_id = new_id

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends inside reasoning."""
        return self._router.is_reasoning

    def feed(self, text: str, token_id: int | None = None) -> list[OutputEvent]:
        """The events that became certain with this piece of text.

        A block's calls come whole, and when the block ends: until then, quotes that close later may change what the
        calls before were (`[f(a='x'), g(b='` may go on as `y')]` or as `) is all')]`).

        Args:
            text: a piece of the answer, cut anywhere.
            token_id: the token it came from; a marker's token counts as the marker even if its text was left out.
        """
        marker = None if token_id is None else self._marker_tokens.get(token_id)
        if marker is not None and not text.endswith(marker):
            text += marker
        return self._events(self._router.feed(text))

    def finish(self) -> list[OutputEvent]:
        """The remaining events, when the answer has ended."""
        return self._events(self._router.finish())

    def _events(self, spans: Iterable[Span]) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        for span in spans:
            if span.kind == "reasoning":
                events.append(ReasoningDelta(text=span.text))
            elif span.kind == "content":
                events.append(ContentDelta(text=span.text))
            elif span.kind == "block":
                events += self._block_events(span)
            elif span.text == THINK_START:
                # Reasoning may be empty; that there was some is said here.
                events.append(ReasoningDelta(text=""))
        return events

    def _block_events(self, block: Span) -> list[OutputEvent]:
        outcomes = read_block(block, self._schemas, self._new_id)
        is_all_text = not any(isinstance(outcome, ToolCall) for outcome in outcomes)
        events: list[OutputEvent] = [ContentDelta(text=block.text)] if is_all_text else []
        for outcome in outcomes:
            if isinstance(outcome, ToolCall):
                events.append(ToolCallDone(call=outcome))
                continue
            if not is_all_text:
                events.append(ContentDelta(text=outcome.text))
            events.append(ToolCallFailed(error=outcome))
        return events


class RawStream(OutputStream):
    """Everything is content, markers included: for texts that go on without a template."""

    def feed(self, text: str, token_id: int | None = None) -> list[OutputEvent]:
        """The text as it is."""
        return [ContentDelta(text=text)] if text else []

    def finish(self) -> list[OutputEvent]:
        """Nothing is ever held back."""
        return []


def parse_output(text: str, tools: Iterable[Tool] | None = None, *, in_reasoning: bool = False) -> ParsedOutput:
    """Take a finished answer apart. It is the stream of the whole text in one piece, so both always agree.

    Args:
        text: what the model wrote, special tokens included.
        tools: the functions it was given; None checks no names and types, and matches no values without a name.
        in_reasoning: whether the prompt ended in `<think>`, so that the text begins inside reasoning.

    Raises:
        OptionError: a tool has no name or no proper schema.
    """
    stream = OutputStream(tools, in_reasoning=in_reasoning)
    return collect([*stream.feed(text), *stream.finish()], in_reasoning=in_reasoning, is_open=stream.is_reasoning)


def merged(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """The same answer in as few events as possible: deltas of one kind in a row become one."""
    out: list[OutputEvent] = []
    for kind, run in itertools.groupby(events, type):
        group = list(run)
        text = "".join(event.text for event in group if isinstance(event, ContentDelta | ReasoningDelta))
        if issubclass(kind, ContentDelta):
            out.append(ContentDelta(text=text))
        elif issubclass(kind, ReasoningDelta):
            out.append(ReasoningDelta(text=text))
        else:
            out += group
    return out


def collect(events: Iterable[OutputEvent], *, in_reasoning: bool = False, is_open: bool = False) -> ParsedOutput:
    """All events of an answer as one value.

    Args:
        in_reasoning: as it was given to the stream.
        is_open: the stream's `is_reasoning` at the end.
    """
    reasoning: list[str] = [""] if in_reasoning else []
    content: list[str] = []
    calls: list[ToolCall] = []
    errors: list[CallError] = []
    for event in events:
        if isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ToolCallDone):
            calls.append(event.call)
        else:
            errors.append(event.error)
    return ParsedOutput(
        reasoning="".join(reasoning) if reasoning else None,
        content="".join(content),
        tool_calls=tuple(calls),
        errors=tuple(errors),
        is_reasoning_open=is_open,
    )
