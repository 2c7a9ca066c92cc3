"""The list of calls between two markers: what can be read, what cannot, each with its place."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from lfm_mlx.parsing.item_reader import CALL_NAME, MAX_DEPTH, Break, Item, ItemReader, StepLimit
from lfm_mlx.parsing.json_form import call_of_object
from lfm_mlx.parsing.literals import Problem
from lfm_mlx.parsing.quotes import AMBIGUOUS, NO_BORDER, Readings, may_be_expression, skip_brackets

_NAME: Final = re.compile(rf"{CALL_NAME.pattern}(?=\s*\()")
_COMMA: Final = re.compile(r"\s*(?:,\s*|\Z)")
_COMMA_OR_NEWLINE: Final = re.compile(rf"\s*(?:,\s*|(?<=\s)(?={CALL_NAME.pattern}\s*\(|\{{)|\Z)")
_BRACKET: Final = re.compile(r"[()\[\]{},]")
_PAIRS: Final = {")": "(", "]": "[", "}": "{"}


MAX_STEPS: Final = 300_000
"""Values, commas and brackets in one block; more than a context of 128,000 tokens can hold."""
MAX_REPAIR_STEPS: Final = 80_000
"""The same, and quotes tried, while quotes are repaired."""
MAX_CALLS: Final = 10_000
MAX_REPAIRS: Final = 500
"""Calls in one block, and calls from the first damaged one on."""


class ReadCall(NamedTuple):
    """A call as it stands in the text; `values` are those without a name."""

    name: str
    values: list[Any]
    arguments: dict[str, Any]
    start: int
    end: int


class UnreadCall(NamedTuple):
    """What looks like a call and cannot be read."""

    name: str | None
    problem: Problem
    start: int
    end: int


CallReading = ReadCall | UnreadCall


def read_call_list(text: str, *, is_closed: bool = True) -> list[CallReading]:
    """The calls in a block's text, `[f(a=1), g()]`, in order; each that cannot be read stands for itself.

    Args:
        text: what stands between the markers.
        is_closed: whether the end marker came; without it no quotes are repaired, and nothing after the first damage
            is read.
    """
    start = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    is_list = text.startswith("[", start)
    # A missing bracket is forgiven where no string can hide it.
    is_cut = is_list and not text.endswith("]", start, end) and any(quote in text for quote in "'\"")
    if is_list:
        start += 1
        end -= text.endswith("]", start, end)
    calls = _CallList(text, end, is_closed, _COMMA if is_list else _COMMA_OR_NEWLINE).read(start)
    if is_cut and calls and calls[-1].end == end and isinstance(calls[-1], ReadCall):
        last = calls[-1]
        problem = Problem("truncated", "the list of calls is not closed, expected ]")
        calls[-1] = UnreadCall(last.name, problem, last.start, last.end)
    return calls


class _CallList:
    def __init__(self, text: str, end: int, is_closed: bool, separator: re.Pattern[str] = _COMMA) -> None:
        self._text = text
        self._separator = separator
        self._end = end
        self._is_closed = is_closed
        self._steps_left = min(200 + 16 * len(text), MAX_STEPS)
        self._calls: list[CallReading] = []

    def read(self, start: int) -> list[CallReading]:
        try:
            self._read_items(start + _leading_space(self._text, start, self._end))
        except StepLimit:
            at = self._calls[-1].end if self._calls else start
            self._fail(Problem("too_long", "the list of calls is too long to be read"), at, self._end)
        return self._calls

    def _read_items(self, at: int) -> None:
        while at < self._end:
            if len(self._calls) >= MAX_CALLS:
                raise StepLimit
            end = self._read_one(at)
            if end < 0:
                self._doubt_last(at)
                self._read_rest(at)
                break
            separator = self._separator.match(self._text, end, self._end)
            if separator is None:
                self._fail(Problem("syntax", "text stands after a call, expected a comma or the end"), end, self._end)
                break
            at = separator.end()

    def _read_one(self, at: int) -> int:
        """Read the item at `at`; returns its end, or -1 if it is not clear where it ends."""
        reader = ItemReader(self._text, self._end, max_steps=self._steps_left)
        try:
            item = self._counted(reader, at)
        except Break as reason:
            is_about_quotes = reason.string is not None and not may_be_expression(
                self._text, reason.state.at, self._end
            )
            if is_about_quotes or _NAME.match(self._text, at, self._end) is None:
                return -1
            end = skip_brackets(self._text, at, self._end, [], only_one=True)
            if end < 0 or not self._is_border(end):
                return -1
            self._fail(_expression_problem(reason), at, end)
            return end
        if not self._is_border(item.end):
            return -1
        self._calls.append(_call_of(item))
        return item.end

    def _counted(self, reader: ItemReader, at: int) -> Item:
        try:
            return reader.read_item(at)
        finally:
            self._steps_left -= reader.num_steps

    def _is_border(self, at: int) -> bool:
        return self._separator.match(self._text, at, self._end) is not None

    def _doubt_last(self, at: int) -> None:
        """Where no call begins after a comma, the call before may have been meant to go on: its string closes early."""
        last = self._calls[-1] if self._calls else None
        is_item = _NAME.match(self._text, at, self._end) is not None or self._text[at] == "{"
        if isinstance(last, ReadCall) and not is_item and any(q in self._text[last.start : last.end] for q in "'\""):
            self._calls[-1] = UnreadCall(last.name, AMBIGUOUS, last.start, last.end)

    def _read_rest(self, at: int) -> None:
        """Read from where quotes or brackets are damaged: call by call if the brackets alone tell them apart."""
        if not self._is_closed:
            self._fail(Problem("truncated", "the call is not complete, the text ends inside it"), at, self._end)
            return
        num_before = len(self._calls)
        for start, end in split_by_brackets(self._text, at, self._end) or [(at, self._end)]:
            if len(self._calls) >= num_before + MAX_REPAIRS:
                raise StepLimit
            readings = Readings(self._text, start, end, min(self._steps_left, MAX_REPAIR_STEPS))
            items = readings.only_one()
            self._steps_left -= readings.num_steps
            if items is NO_BORDER:
                # The brackets that told the calls apart stand inside a string.
                del self._calls[num_before:]
                self._fail(NO_BORDER, at, self._end)
                break
            if isinstance(items, Problem):
                self._fail(items, start, end)
            else:
                self._calls += [_call_of(item) for item in items]

    def _fail(self, problem: Problem, start: int, end: int) -> None:
        name = _NAME.match(self._text, start, end)
        self._calls.append(UnreadCall(None if name is None else name[0], problem, start, end))


def split_by_brackets(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The places of the items in a list, told by brackets alone, in strings as well; [] if these do not match."""
    items = []
    opened: list[str] = []
    item_start = start
    for match in _BRACKET.finditer(text, start, end):
        sign = match[0]
        if sign in _PAIRS:
            if not opened or opened.pop() != _PAIRS[sign]:
                return []
        elif sign != ",":
            opened.append(sign)
            if len(opened) > MAX_DEPTH + 2:
                return []
        elif not opened:
            items.append((item_start, match.start()))
            item_start = match.end()
    items.append((item_start, end))
    trimmed = [_trim(text, *place) for place in items]
    if trimmed and trimmed[-1][0] == trimmed[-1][1]:
        trimmed.pop()
    return [] if opened or not all(_is_item(text, *place) for place in trimmed) else trimmed


def _is_item(text: str, start: int, end: int) -> bool:
    """Whether the text has the outside of a call or an object, with no bracket closed before the last."""
    opener = _NAME.match(text, start, end)
    if (opener is None or text[end - 1] != ")") and (text[start : start + 1] != "{" or text[end - 1] != "}"):
        return False
    depth = 0
    for match in _BRACKET.finditer(text, start, end - 1):
        depth += (match[0] in "([{") - (match[0] in _PAIRS)
        if depth == 0 and match[0] != ",":
            return False
    return True


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    start += _leading_space(text, start, end)
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _leading_space(text: str, start: int, end: int) -> int:
    at = start
    while at < end and text[at].isspace():
        at += 1
    return at - start


def _expression_problem(reason: Break) -> Problem:
    code, message = reason.problem
    return reason.problem if code != "syntax" else Problem("not_literal", f"{message}; expected literal values only")


def _call_of(item: Item) -> CallReading:
    name, values, arguments, start, end = item
    if name is None and not isinstance(arguments, Problem):
        found = call_of_object(arguments)
        if isinstance(found, Problem):
            return UnreadCall(None, found, start, end)
        name, arguments = found
    if isinstance(arguments, Problem) or name is None:
        problem = arguments if isinstance(arguments, Problem) else Problem("syntax", "a call has no name")
        return UnreadCall(name, problem, start, end)
    return ReadCall(name, values, arguments, start, end)
