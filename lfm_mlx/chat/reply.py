"""What a turn of a chat yields: events while it is written, and the reply when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lfm_mlx.types import CallError, OutputEvent, ToolCall

TurnEnd = Literal["stop", "length", "cancelled", "repetition", "tool_calls", "max_rounds", "time_limit"]
"""Why a turn ended: as a generation does, or with calls for the caller, or at a limit on automatic execution."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a turn, all its rounds together.

    Args:
        prompt_tokens: tokens of the prompts.
        cached_tokens: those of them that did not have to be computed again.
        completion_tokens: tokens that were generated.
        reasoning_tokens: those of them that were reasoning.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model answered.

    Args:
        content: the answer itself.
        reasoning: what it thought first; None where it did not.
        tool_calls: the calls of the last round; with automatic execution, those that were not carried out.
        errors: calls that could not be read or do not fit their tool.
        usage: tokens, all rounds together.
        finish_reason: why the turn ended.
        parsed: the value, where a schema was asked for and the answer is complete.
    """

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    errors: tuple[CallError, ...]
    usage: Usage
    finish_reason: TurnEnd
    parsed: Any = None


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """A tool was run for a call: the text that went back to the model, and whether it is an error's."""

    call: ToolCall
    content: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True)
class TurnDone:
    """The turn is over; the last event of a stream."""

    reply: Reply


ChatEvent = OutputEvent | ToolResult | TurnDone
"""What `Chat.stream` yields."""
