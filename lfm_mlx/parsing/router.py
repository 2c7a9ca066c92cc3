"""Generated text, piece by piece, into spans: reasoning, content, blocks of tool calls, and the markers between them.

The spans, joined, are the text. How the text was cut changes where spans are cut, and nothing else.

Where markers count:

- `<think>` opens reasoning at the beginning of the answer and after reasoning or a block, whitespace aside. Inside
  reasoning only `</think>` counts. A `<think>` in the middle of prose is text, and so are the calls up to its
  `</think>`; without a `</think>` the calls are calls, which is known at the end only.
- `<|tool_call_start|>` opens a block. Outside of strings the next `<|tool_call_end|>` closes it, and the next
  `<|tool_call_start|>` begins another, unless quotes are damaged before it. Inside a string both are text.
- A `<|tool_call_end|>` that stands in a string only because quotes inside it are not escaped closes the block if the
  calls before it can be read, and with the next `<|tool_call_end|>` they cannot. If both can be, the block is
  `ambiguous`. A string that is never closed ends at the first `<|tool_call_end|>` in it.

A marker is its text or its token: models that were converted without special tokens write the text in several tokens.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from lfm_mlx.parsing.call_list import CallReading, ReadCall, read_call_list
from lfm_mlx.parsing.literals import closing_quote
from lfm_mlx.parsing.quotes import are_quotes_plausible
from lfm_mlx.tokenizer.special import THINK_END, THINK_START, TOOL_CALL_END, TOOL_CALL_START

MAX_READS: Final = 6
"""How many end markers inside one open string are tried as the end of the block."""
MAX_RETURNS: Final = 6
"""How many strings that are never closed are ended early; after these, the rest is one block."""

_QUOTE: Final = re.compile(r"'''|\"\"\"|'|\"")

SpanKind = Literal["reasoning", "content", "marker", "block"]
BlockEnd = Literal["closed", "open", "overtaken", "ambiguous"]
"""By its marker; by the end of the text; by the start of another block; by one of two markers, nobody knows which."""


class Span(NamedTuple):
    """A piece of the text.

    A block is given whole, with its markers; `end` says how it ended, `readings` are its calls where they had to be
    read to know where it ends.
    """

    kind: SpanKind
    text: str
    end: BlockEnd = "closed"
    readings: tuple[CallReading, ...] | None = None

    @property
    def payload(self) -> str:
        """What stands between a block's markers."""
        text = self.text.removeprefix(TOOL_CALL_START)
        return text if self.end in ("open", "overtaken") else text.removesuffix(TOOL_CALL_END)


class Router:
    """Cuts one answer into spans.

    Args:
        in_reasoning: whether the prompt ended in `<think>`, so that the answer begins inside reasoning.
    """

    def __init__(self, *, in_reasoning: bool = False) -> None:
        self.is_reasoning = in_reasoning
        self._held = ""
        self._block: _Block | None = None
        self._quoted: list[str] | None = None
        self._is_at_border = True
        self._has_quoted_think = False
        self._is_finishing = False
        self._num_returns = 0

    def feed(self, text: str) -> list[Span]:
        """The spans that became certain with this piece of text."""
        spans: list[Span] = []
        # What has to be routed again ends in a whole marker: no marker lies across two of these texts.
        todo = [(self._held + text, 0)]
        self._held = ""
        while todo:
            work, at = todo.pop()
            again, at = self._step(work, at, spans)
            if at < len(work):
                todo.append((work, at))
            if again:
                todo.append((again, 0))
        return spans

    def finish(self) -> list[Span]:
        """The rest, when the text has ended."""
        self._is_finishing = True
        spans = self.feed("")
        while self._block is not None or self._quoted is not None:
            rest = self._end_block(spans) if self._block is not None else self._end_quoted()
            spans += self.feed(rest)
        return spans

    def _step(self, work: str, at: int, spans: list[Span]) -> tuple[str, int]:
        """Take text up to and with the next marker; returns text to be routed again, and where to go on."""
        match = self._markers().search(work, at)
        if match is not None:
            self._take(work[at : match.start()], spans)
            return self._at_marker(match[0], spans), match.end()
        stop = len(work) - self._held_len(work, at)
        self._take(work[at:stop], spans)
        self._held = work[stop:]
        return "", len(work)

    def _markers(self) -> re.Pattern[str]:
        if self.is_reasoning or self._quoted is not None:
            return _PATTERNS[THINK_END]
        if self._block is not None:
            return _PATTERNS[TOOL_CALL_START, TOOL_CALL_END]
        return _PATTERNS[TOOL_CALL_START, THINK_START, THINK_END]

    def _held_len(self, work: str, at: int) -> int:
        """Length of the longest end of `work[at:]` that may become one of the markers that count now."""
        if self._is_finishing:
            return 0
        match = _BEGINNINGS[self._markers()].search(work, max(at, len(work) - _MAX_MARKER_LEN))
        return 0 if match is None else len(match[0])

    def _take(self, text: str, spans: list[Span]) -> None:
        if not text:
            return
        if self._quoted is not None:
            self._quoted.append(text)
        elif self._block is not None:
            self._block.add(text)
        elif self.is_reasoning:
            spans.append(Span("reasoning", text))
        else:
            self._is_at_border = self._is_at_border and text.isspace()
            spans.append(Span("content", text))

    def _at_marker(self, marker: str, spans: list[Span]) -> str:
        """Cross a marker; returns text that has to be routed again."""
        if self._quoted is not None:
            spans.append(Span("content", "".join(self._quoted) + marker))
            self._quoted = None
            self._has_quoted_think = False
        elif self._block is not None:
            return self._in_block(marker, spans)
        elif self.is_reasoning:
            self.is_reasoning = False
            self._is_at_border = True
            spans.append(Span("marker", marker))
        elif marker == TOOL_CALL_START:
            if self._has_quoted_think:
                self._quoted = [marker]
            else:
                self._block = _Block()
        elif marker == THINK_START and self._is_at_border:
            self.is_reasoning = True
            spans.append(Span("marker", marker))
        else:
            self._has_quoted_think = marker == THINK_START and not self._is_finishing
            self._is_at_border = False
            spans.append(Span("content", marker))
        return ""

    def _in_block(self, marker: str, spans: list[Span]) -> str:
        block = self._block
        assert block is not None
        is_in_string = block.settle()
        if block.closed_len is not None:
            if marker == TOOL_CALL_START:
                return self._close_early(block.closed_len, spans) + marker
            if not may_read_on(block.payload()):
                return self._close_early(block.closed_len, spans) + marker
            self._close(Span("block", block.text() + marker, "ambiguous"), spans)
        elif is_in_string:
            if marker == TOOL_CALL_END:
                block.note_end()
            block.add(marker)
        elif marker == TOOL_CALL_END:
            self._close(Span("block", block.text() + marker), spans)
        elif block.is_damaged():
            # Reading quotes strictly went wrong before: nobody knows whether this is text.
            block.add(marker)
        else:
            self._close(Span("block", block.text(), "overtaken"), spans)
            return marker
        return ""

    def _close(self, span: Span, spans: list[Span]) -> None:
        spans.append(span)
        self._block = None
        self._is_at_border = True

    def _close_early(self, length: int, spans: list[Span]) -> str:
        """End the block at an earlier end marker; returns what came after it."""
        assert self._block is not None
        payload = self._block.payload()
        readings = self._block.readings if length == self._block.closed_len else None
        self._close(Span("block", TOOL_CALL_START + payload[:length] + TOOL_CALL_END, "closed", readings), spans)
        return payload[length + len(TOOL_CALL_END) :]

    def _end_block(self, spans: list[Span]) -> str:
        block = self._block
        assert block is not None
        block.settle()
        length = block.closed_len
        if length is None and self._num_returns < MAX_RETURNS:
            length = block.first_end_len
            self._num_returns += 1
        if length is not None:
            return self._close_early(length, spans)
        self._close(Span("block", block.text(), "open"), spans)
        return ""

    def _end_quoted(self) -> str:
        """No `</think>` came: what was taken for quoted reasoning is the answer."""
        assert self._quoted is not None
        text = "".join(self._quoted)
        self._quoted = None
        self._has_quoted_think = False
        return text


class _Block:
    """A block of calls while it is written. Lengths count the text after the start marker."""

    def __init__(self) -> None:
        self._settled: list[str] = []
        self._settled_len = 0
        self._new: list[str] = []
        self._delimiter = ""
        self._num_reads = 0
        self.first_end_len: int | None = None
        self._is_damaged: bool | None = None
        self.closed_len: int | None = None
        self.readings: tuple[CallReading, ...] = ()

    def add(self, text: str) -> None:
        self._new.append(text)

    def settle(self) -> bool:
        """Read the quotes in what was added; returns whether a string is open."""
        text = "".join(self._new)
        self._new = []
        self._settled.append(text)
        self._settled_len += len(text)
        self._delimiter = open_string(text, self._delimiter)
        return self._delimiter != ""

    def note_end(self) -> None:
        """An end marker follows inside an open string: it may end the block all the same."""
        if self.first_end_len is None:
            self.first_end_len = self._settled_len
        if self._num_reads < MAX_READS:
            self._num_reads += 1
            self.readings = whole_readings(self.payload())
            if self.readings:
                self.closed_len = self._settled_len

    def is_damaged(self) -> bool:
        """Whether quotes stand where none can. Asked once; if they do, the block never gets well."""
        if self._is_damaged is None:
            self._is_damaged = not are_quotes_plausible(self.payload())
        return self._is_damaged

    def payload(self) -> str:
        return "".join(self._settled)

    def text(self) -> str:
        return TOOL_CALL_START + self.payload()


def open_string(text: str, delimiter: str) -> str:
    """The quotes of the string that is open at the end of `text`, "" for none.

    Args:
        delimiter: the same at its beginning.
    """
    at = 0
    while True:
        if delimiter:
            closer = closing_quote(text, at, len(text), delimiter)
            if closer < 0:
                return delimiter
            at = closer + len(delimiter)
        match = _QUOTE.search(text, at)
        if match is None:
            return ""
        delimiter, at = match[0], match.end()


def whole_readings(payload: str) -> tuple[CallReading, ...]:
    """The calls of a block if every one can be read, else none."""
    readings = read_call_list(payload)
    return tuple(readings) if all(isinstance(reading, ReadCall) for reading in readings) else ()


def may_read_on(payload: str) -> bool:
    """Whether a block that can end earlier may be meant to end here: each call can be read, or quotes hide that."""
    readings = read_call_list(payload)
    return all(isinstance(reading, ReadCall) or reading.problem.code == "ambiguous_quotes" for reading in readings)


def _beginnings(*markers: str) -> re.Pattern[str]:
    """Matches the beginning of a marker at the end of a text."""
    parts = [re.escape(marker[:length]) for marker in markers for length in range(len(marker) - 1, 0, -1)]
    return re.compile(f"(?:{'|'.join(sorted(set(parts), key=len, reverse=True))})\\Z")


_SETS: Final = (
    (THINK_END,),
    (TOOL_CALL_START, TOOL_CALL_END),
    (TOOL_CALL_START, THINK_START, THINK_END),
)
_PATTERNS: Final = {
    (markers if len(markers) > 1 else markers[0]): re.compile("|".join(map(re.escape, markers))) for markers in _SETS
}
_BEGINNINGS: Final = {
    pattern: _beginnings(*([key] if isinstance(key, str) else key)) for key, pattern in _PATTERNS.items()
}
_MAX_MARKER_LEN: Final = max(map(len, (TOOL_CALL_START, TOOL_CALL_END, THINK_END)))
