"""How a turn looks: text that streams and is never redrawn, so that it reads the same over ssh and in a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Literal

from rich.console import Console

from lfm_mlx.chat import ChatEvent, ToolResult, TurnDone
from lfm_mlx.types import CallError, ContentDelta, ReasoningDelta, ToolCall, ToolCallDone, ToolCallFailed

SHOWN_RESULT = 400
"""Characters of a tool's result that are shown; the model reads all of it."""

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Left out: what a model or a tool writes must not steer the terminal."""

_ENDS = {
    "cancelled": "stopped",
    "length": "cut: max_tokens or the context is used up",
    "repetition": "ended: the answer went round in circles",
    "tool_calls": "ended with calls that this chat has no function for",
    "max_rounds": "ended: too many rounds of tool calls",
    "time_limit": "ended: the time limit is reached",
}


def has_styles(*, no_color: bool) -> bool:
    """Whether escape codes are wanted; a console finds out by itself whether its output is a terminal."""
    return not (no_color or os.environ.get("NO_COLOR") or is_dumb())


def is_dumb() -> bool:
    """Whether the terminal can do no more than print lines."""
    return os.environ.get("TERM", "dumb").lower() in ("", "dumb", "unknown")


def make_console(*, is_styled: bool, is_error: bool = False) -> Console:
    """A console that writes text as it is; without style there is not one escape code, dimmed ones included."""
    return Console(
        stderr=is_error, color_system="auto" if is_styled else None, highlight=False, markup=False, emoji=False
    )


class Rendering:
    """Writes the events of a chat.

    Args:
        answers: gets the content, as it is.
        notes: gets everything else, dimmed; the same console in a terminal.
        count_tokens: tokens of a text, for the line that stands for folded reasoning.

    Attributes:
        is_folded: whether reasoning is one line instead of its text.
    """

    def __init__(self, answers: Console, notes: Console, *, count_tokens: Callable[[str], int]) -> None:
        self.is_folded = False
        self._answers = answers
        self._notes = notes
        self._count_tokens = count_tokens
        self._part: Literal["reasoning", "content"] | None = None
        self._reasoning = ""
        self._is_line_open = False
        self._started_s = 0.0

    def show(self, event: ChatEvent) -> None:
        """Write one event."""
        if isinstance(event, ReasoningDelta):
            self._open("reasoning")
            self._reasoning += event.text
            if not self.is_folded:
                self._write_reasoning(event.text)
        elif isinstance(event, ContentDelta):
            self._open("content")
            self._write_content(event.text)
        else:
            self.close()
            self._show_whole(event)

    def close(self) -> None:
        """End the line and the part that is being written."""
        if self._part == "reasoning" and self.is_folded:
            passed_s, count = time.monotonic() - self._started_s, self._count_tokens(self._reasoning)
            self._notes.out(f"thought for {passed_s:.0f} s, {count:,} tokens", style="dim", highlight=False, end="")
            self._is_line_open = True
        if self._is_line_open:
            self._end_line()
        self._part = None

    def unfold(self) -> None:
        """Show reasoning from now on, and what was folded last."""
        if self.is_folded and self._reasoning:
            self.note(self._reasoning.strip("\n"))
        self.is_folded = False

    def note(self, text: str) -> None:
        """A line of the program's own."""
        self.close()
        self._notes.out(_printable(text), style="dim", highlight=False)

    def complain(self, text: str) -> None:
        """A line that says what went wrong."""
        self.close()
        self._notes.out(_printable(f"error: {text}"), style="red", highlight=False)

    def space(self) -> None:
        """An empty line between turns."""
        self._notes.out("", highlight=False)

    def prompt(self, text: str) -> None:
        """A question that is answered on the same line."""
        self.close()
        self._notes.out(_printable(text), highlight=False, end="")

    def _open(self, part: Literal["reasoning", "content"]) -> None:
        if self._part == part:
            return
        self.close()
        self._part = part
        if part == "reasoning":
            self._reasoning, self._started_s = "", time.monotonic()
            # Without dimmed letters only words can tell reasoning from answer.
            label = "thinking ... " if self.is_folded else "" if self._notes.color_system else "thinking: "
            self._notes.out(label, style="dim", highlight=False, end="")

    def _write_reasoning(self, text: str) -> None:
        self._notes.out(_printable(text), style="dim", highlight=False, end="")
        self._is_line_open = not text.endswith("\n")

    def _write_content(self, text: str) -> None:
        # Not through rich, which turns tabs into spaces.
        self._answers.file.write(_printable(text))
        self._answers.file.flush()
        self._is_line_open = not text.endswith("\n")

    def _end_line(self) -> None:
        console = self._answers if self._part == "content" else self._notes
        console.file.write("\n")
        console.file.flush()
        self._is_line_open = False

    def _show_whole(self, event: ChatEvent) -> None:
        if isinstance(event, ToolCallDone):
            self.note(f"-> {call_text(event.call)}")
        elif isinstance(event, ToolCallFailed):
            self.note(f"-> not run: {_error_text(event.error)}")
        elif isinstance(event, ToolResult):
            self.note(f"<- {_cut(event.content)}")
        elif isinstance(event, TurnDone) and event.reply.finish_reason in _ENDS:
            self.note(f"[{_ENDS[event.reply.finish_reason]}]")


def call_text(call: ToolCall) -> str:
    """A call as a Python programmer would write it."""
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def _error_text(error: CallError) -> str:
    return f"{error.name}: {error.message}" if error.name else error.message


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_RESULT else f"{text[:SHOWN_RESULT]} ... ({len(text):,} characters)"


def _printable(text: str) -> str:
    return text.translate(_CONTROLS)
