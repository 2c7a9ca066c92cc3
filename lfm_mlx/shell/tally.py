"""What turns cost: tokens, and the time that went into prompts, answers and tools."""

from __future__ import annotations

import time

from lfm_mlx.chat import ChatEvent, ToolResult, TurnDone, Usage


class Tally:
    """Told of every event; `lines` says what they add up to."""

    def __init__(self) -> None:
        self.num_turns = 0
        self._total = Usage()
        self._last = Usage()
        self._prompt_s = self._answer_s = 0.0
        self._is_waiting = True
        self._then_s = time.monotonic()

    def begin(self) -> None:
        """A turn begins."""
        self._prompt_s = self._answer_s = 0.0
        self._is_waiting = True
        self._then_s = time.monotonic()

    def note(self, event: ChatEvent) -> None:
        """Take note of an event: the first after a prompt ends its reading, later ones the writing of the answer."""
        now_s = time.monotonic()
        passed_s, self._then_s = now_s - self._then_s, now_s
        if isinstance(event, ToolResult):
            self._is_waiting = True
        elif self._is_waiting:
            self._prompt_s += passed_s
            self._is_waiting = False
        else:
            self._answer_s += passed_s
        if isinstance(event, TurnDone):
            self.num_turns += 1
            self._last = event.reply.usage
            self._total = self._total + self._last

    def lines(self) -> list[str]:
        """The last turn and all turns, for people."""
        last, total = self._last, self._total
        speed = f"{last.completion_tokens / self._answer_s:.1f} tokens/s" if self._answer_s else "no time measured"
        read, written = _read_text(last), f"{last.completion_tokens:,} tokens ({last.reasoning_tokens:,} reasoning)"
        return [
            f"last turn: prompt {read} in {self._prompt_s:.1f} s, answer {written}, {speed}",
            f"all {self.num_turns} turns: prompts {_read_text(total)}, answers {total.completion_tokens:,} tokens",
        ]


def _read_text(usage: Usage) -> str:
    return f"{usage.prompt_tokens:,} tokens ({usage.cached_tokens:,} cached)"
