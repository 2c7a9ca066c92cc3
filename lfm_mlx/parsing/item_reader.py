"""Reads a list of calls as it stands, strictly from left to right, and says where the reading breaks.

An item of the list is a call, `name(value, argument=value)`, or the JSON form of one, an object. The reader is a loop
over an explicit state, so deep nesting costs no recursion, and reading can go on from an earlier state with another
opinion about where a string ends (see `quotes`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lfm_mlx.parsing.literals import Problem, closing_quote, number_at, string_value

MAX_DEPTH: Final = 64
_MAX_ADJACENT: Final = 100

_SPACE: Final = re.compile(r"\s*")
CALL_NAME: Final = re.compile(r"\w[\w.\-/]*")
ARGUMENT_NAME: Final = re.compile(r"(?:[^\W\d]|[$@])[\w$@.\-]*")
_CALL: Final = re.compile(rf"({CALL_NAME.pattern})\s*\(")
_ARGUMENT: Final = re.compile(rf"({ARGUMENT_NAME.pattern})\s*=(?!=)")
_WORD: Final = re.compile(r"[^\W\d]\w*(?:[.\-]\w+)*|\.\.\.|[0-9.][\w.]*")
_STRING: Final = re.compile(r"([bB][rR]?|[rR][bBfF]?|[fFtT][rR]?|[uU]|)('''|\"\"\"|'|\")")
_ESCAPED_QUOTE: Final = re.compile(r"(\\\\)|\\(['\"])")
_CONSTANTS: Final[dict[str, Any]] = {
    "True": True,
    "False": False,
    "None": None,
    "true": True,
    "false": False,
    "null": None,
}
_OPENERS: Final = {"[": "[", "{": "{", "(": "t"}
_CLOSERS: Final = {"L": "", "(": ")", "[": "]", "t": ")", "T": ")", "{": "}", "d": "}", "s": "}"}


class Item(NamedTuple):
    """One element of the list: a call, or a JSON object where `name` is None."""

    name: str | None
    values: list[Any]
    arguments: dict[str, Any] | Problem
    start: int
    end: int


class Frame(NamedTuple):
    """An open bracket.

    `kind` is L list of items, ( call, [ list, t or T parentheses without or with a comma, { braces, d dict, s set;
    `shape` is the kinds of all open brackets; `outer` is the state to which the bracket's value will be added.
    """

    kind: str
    shape: str
    start: int
    outer: State | None = None
    name: str | None = None


class State(NamedTuple):
    """Where reading stands: before a value, or after one.

    `items` are the values so far as a chain of pairs, so that an earlier state stays valid; `key` belongs to the value
    that is due; `pending` holds a value of which only a colon or comma will tell whether it is a key.
    """

    at: int
    frame: Frame
    items: Any = None
    key: Any = None
    pending: Any = None
    is_after_value: bool = False


class OpenString(NamedTuple):
    """A string as it begins, with the state before it."""

    state: State
    prefix: str
    delimiter: str
    body: int


class Chain(NamedTuple):
    """Adjacent strings, read as one; `delimiters` are the quotes used last and before."""

    value: Any
    delimiters: str
    start: State
    num_strings: int


class Break(Exception):  # noqa: N818 (an outcome of reading, not an error of the program)
    """Reading cannot go on; `string` is the string whose quotes may be the reason."""

    def __init__(self, code: str, message: str, state: State, string: OpenString | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(code, message)
        self.state = state
        self.string = string


class StepLimit(Exception):  # noqa: N818
    """Reading took too many steps."""


class ItemReader:
    """Reads items of `text` up to `end`.

    Args:
        max_steps: after this many steps, `StepLimit` is raised.
        closers: where strings are closed that strict reading would close elsewhere, by where their bodies begin.
    """

    def __init__(self, text: str, end: int, *, max_steps: int, closers: Mapping[int, int] | None = None) -> None:
        self.text = text
        self.end = end
        self.num_steps = 0
        self.max_steps = max_steps
        self._closers = closers or {}
        self._string: OpenString | None = None
        self._chain: Chain | None = None

    def start(self, at: int) -> State:
        """The state before the first item."""
        return State(at, Frame("L", "L", at))

    def read_item(self, at: int) -> Item:
        """The one item that begins at `at`. Raises Break, StepLimit."""
        return self._run(self.start(at), only_one=True)[0]

    def read_all(self, state: State) -> list[Item]:
        """All items from `state` to the end. Raises Break, StepLimit."""
        return self._run(state, only_one=False)

    def close_string(self, string: OpenString, closer: int) -> State:
        """The state after `string` when it is closed at `closer`, which strict reading would not do.

        Only for trying: its value is left empty.
        """
        self._string = string
        self._chain = None
        return self._put(string.state, "", closer + len(string.delimiter))

    def _run(self, state: State, *, only_one: bool) -> list[Item]:
        text, end = self.text, self.end
        while True:
            self.num_steps += 1
            if self.num_steps > self.max_steps:
                raise StepLimit
            at = state.at
            gap = ""
            if at < end and text[at].isspace():
                gap = _space_at(text, at, end)
                at += len(gap)
                state = State(at, *state[1:])
            if state.frame.kind == "L" and state.items is not None and (only_one or at == end):
                return _unroll(state.items)
            if at == end:
                raise Break("syntax", "the text ends inside a call", state)
            state = self._after(state, gap) if state.is_after_value else self._before(state)

    def _before(self, state: State) -> State:
        """One step where a value, a key or a closing bracket is expected."""
        text, at, frame = self.text, state.at, state.frame
        sign = text[at]
        if frame.kind == "L":
            return self._open_item(state)
        if state.key is None:
            if sign == _CLOSERS[frame.kind]:
                return self._close(state)
            if frame.kind == "(":
                named = _ARGUMENT.match(text, at, self.end)
                if named is not None:
                    return State(named.end(), frame, state.items, named[1])
                if text.startswith("**", at, self.end):
                    return State(at + 2, frame, state.items, "**")
        string = _STRING.match(text, at, self.end)
        if string is not None:
            return self._read_string(state, string)
        if sign in _OPENERS:
            return self._open(state, _OPENERS[sign], at + 1)
        number = number_at(text, at, self.end)
        if number is not None:
            self._chain = None
            return self._put(state, *number)
        return self._read_word(state)

    def _read_word(self, state: State) -> State:
        word = _WORD.match(self.text, state.at, self.end)
        if word is None:
            raise self._break(state, f"{self.text[state.at]!r} stands where a value was expected")
        self._chain = None
        name = word[0]
        if name in _CONSTANTS:
            return self._put(state, _CONSTANTS[name], word.end())
        message = f"{name[:80]!r} is no literal, expected a value such as 'text', 1, True or [1]"
        return self._put(state, Problem("not_literal", message), word.end())

    def _after(self, state: State, gap: str) -> State:
        """One step where a comma, a colon or a closing bracket is expected."""
        at, frame = state.at, state.frame
        sign = self.text[at]
        if sign == ",":
            return self._next_value(state, at + 1)
        if sign == _CLOSERS[frame.kind]:
            return self._close(state)
        if sign == ":" and frame.kind in "{d" and state.pending is not None:
            self._chain = None
            return State(at + 1, _of_kind(frame, "d"), state.items, state.pending)
        if self._chain is not None:
            string = _STRING.match(self.text, at, self.end)
            if string is not None and (gap or not string[1]):
                return self._read_string(state, string)
        raise self._break(state, f"{sign!r} stands where a comma or a closing bracket was expected")

    def _open_item(self, state: State) -> State:
        self._string = None
        call = _CALL.match(self.text, state.at, self.end)
        if call is not None:
            return self._open(state, "(", call.end(), name=call[1])
        if self.text[state.at] == "{":
            return self._open(state, "{", state.at + 1)
        raise self._break(state, f"{self.text[state.at]!r} stands where a call was expected, such as name(argument=1)")

    def _open(self, state: State, kind: str, at: int, name: str | None = None) -> State:
        self._chain = None
        shape = state.frame.shape + kind
        if len(shape) > MAX_DEPTH + 2:
            raise Break("too_deep", f"values are nested more than {MAX_DEPTH} deep", state)
        return State(at, Frame(kind, shape, state.at, state, name))

    def _read_string(self, state: State, match: re.Match[str]) -> State:
        chain = self._chain if state.is_after_value else None
        before = chain.start if chain is not None else state
        string = OpenString(before, match[1], match[2], match.end())
        closer = self._closers.get(string.body, -1)
        if closer < 0:
            closer = closing_quote(self.text, string.body, self.end, match[2])
        self.num_steps += ((closer if closer >= 0 else self.end) - string.body) // 500
        if closer < 0:
            raise Break("syntax", "a string is not closed", state, self._string)
        value = self._string_value(string, closer)
        delimiters = match[2][0]
        num_strings = 1
        if chain is not None:
            num_strings += chain.num_strings
            if num_strings > _MAX_ADJACENT:
                raise Break("ambiguous_quotes", f"more than {_MAX_ADJACENT} strings stand side by side", state)
            value = _joined(chain.value, value)
            if delimiters in chain.delimiters:
                value = Problem("ambiguous_quotes", "strings that stand side by side can be read in several ways")
            delimiters += chain.delimiters
        else:
            self._string = string
        self._chain = Chain(value, delimiters, before, num_strings)
        return self._put(before, value, closer + len(match[2]))

    def _string_value(self, string: OpenString, closer: int) -> str | Problem:
        body = self.text[string.body : closer]
        if len(string.delimiter) == 3 and body.lstrip()[:1] in ("", ",", ")", string.delimiter[0]):
            return Problem("ambiguous_quotes", "three quotes may be an empty string or part of one, escape them")
        if not string.prefix and "\\" not in body and body.isascii():
            return body
        is_json = string.state.frame.shape[1:2] in ("{", "d")
        value = string_value(string.prefix, body, is_triple=len(string.delimiter) == 3, is_json=is_json)
        if string.body in self._closers and isinstance(value, str) and value != _ESCAPED_QUOTE.sub(r"\1\2", body):
            return Problem("ambiguous_escape", "a string holds escapes and unescaped quotes, escape all of them")
        return value

    def _put(self, state: State, value: Any, at: int) -> State:
        """The state after a value."""
        frame, items, key = state.frame, state.items, state.key
        kind = frame.kind
        if kind == "(" or (kind == "d" and key is not None):
            return State(at, frame, (items, (key, value)), None, None, True)
        if kind == "{" or kind == "d":
            return State(at, frame, items, None, (value,), True)
        return State(at, frame, (items, value), None, None, True)

    def _next_value(self, state: State, at: int) -> State:
        self._chain = None
        frame, items = state.frame, state.items
        if frame.kind == "t":
            frame = _of_kind(frame, "T")
        elif state.pending is not None:
            frame, items = self._as_set(state)
        return State(at, frame, items)

    def _as_set(self, state: State) -> tuple[Frame, Any]:
        """Braces whose first value is followed by no colon."""
        if state.frame.kind != "{":
            raise self._break(state, "a key without a value stands in a dict")
        return _of_kind(state.frame, "s"), (state.items, *state.pending)

    def _close(self, state: State) -> State:
        frame, items = state.frame, state.items
        if state.pending is not None:
            frame, items = self._as_set(state)
        self._chain = None
        outer = frame.outer
        assert outer is not None
        values, end = _unroll(items), state.at + 1
        if outer.frame.kind != "L":
            return self._put(outer, _container(frame.kind, values), end)
        item = _call_item(frame, values, end) if frame.kind == "(" else _object_item(frame, values, end)
        return State(end, outer.frame, (outer.items, item), None, None, True)

    def _break(self, state: State, message: str) -> Break:
        """A break whose reason are quotes if a string stands directly before it, or a quote directly after it."""
        is_beside_quote = self._chain is not None or self.text[state.at] in "'\""
        return Break("syntax", message, state, self._string if is_beside_quote else None)


def _space_at(text: str, at: int, end: int) -> str:
    match = _SPACE.match(text, at, end)
    return "" if match is None else match[0]


def _unroll(items: Any) -> list[Any]:
    unrolled = []
    while items is not None:
        items, item = items
        unrolled.append(item)
    unrolled.reverse()
    return unrolled


def _of_kind(frame: Frame, kind: str) -> Frame:
    return frame if frame.kind == kind else frame._replace(kind=kind, shape=frame.shape[:-1] + kind)


def _joined(left: Any, right: Any) -> Any:
    if isinstance(left, Problem):
        return left
    return right if isinstance(right, Problem) else left + right


def _container(kind: str, items: list[Any]) -> Any:
    """The JSON value of a closed bracket, or the first problem inside it."""
    if kind in "{d":
        return _dict_value(items)
    problem = next((item for item in items if isinstance(item, Problem)), None)
    if problem is not None:
        return problem
    if kind == "t" and items:
        return items[0]
    if kind == "s":
        if any(isinstance(item, list | dict) for item in items):
            return Problem("no_json_form", "a set holds lists or dicts, expected a list")
        return list(dict.fromkeys(items))
    return items


def _dict_value(items: list[Any]) -> dict[str, Any] | Problem:
    value: dict[str, Any] = {}
    for (key,), item in items:
        if isinstance(key, Problem):
            return key
        if isinstance(item, Problem):
            return item
        if not isinstance(key, str):
            return Problem("no_json_form", f"the key {str(key)[:80]} of a dict is no string")
        if key in value:
            return Problem("duplicate", f"the key {key[:80]!r} stands twice in a dict")
        value[key] = item
    return value


def _object_item(frame: Frame, items: list[Any], end: int) -> Item:
    value = _container(frame.kind, items)
    if isinstance(value, list):
        value = Problem("syntax", "a set stands where a call was expected")
    return Item(None, [], value, frame.start, end)


def _call_item(frame: Frame, items: list[Any], end: int) -> Item:
    values = [value for key, value in items if key is None]
    arguments: dict[str, Any] = {}
    problem = next((value for _, value in items if isinstance(value, Problem)), None)
    if problem is None and any(key is None for key, _ in items[len(values) :]):
        problem = Problem("positional", "a value without a name stands after named arguments")
    for key, value in items:
        if key is None or problem is not None:
            continue
        if key == "**" and not isinstance(value, dict):
            problem = Problem("not_literal", "** stands before a value that is no dict")
            continue
        for name, entry in value.items() if key == "**" else [(key, value)]:
            if name in arguments:
                problem = Problem("duplicate", f"the argument {name[:80]!r} stands twice")
            arguments[name] = entry
    return Item(frame.name, values, problem or arguments, frame.start, end)
