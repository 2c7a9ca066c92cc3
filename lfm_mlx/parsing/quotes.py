"""Unescaped quotes inside quotes: all the ways of closing a string, and whether exactly one of them reads.

Where strict reading breaks beside a string, that string may have been closed too early. Each later quote of its kind
that could close it is tried, and reading goes on strictly from there; where it breaks again, so does this. One reading
is a repair, two are ambiguous. States that were tried are remembered and steps are counted, so time is bounded.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, NamedTuple

from lfm_mlx.parsing.item_reader import Break, Item, ItemReader, OpenString, StepLimit
from lfm_mlx.parsing.literals import Problem, closing_quote

AMBIGUOUS: Final = Problem("ambiguous_quotes", "quotes inside a string can be read in several ways, escape them")
NO_BORDER: Final = Problem("ambiguous_quotes", "quotes inside a string hide where the call ends, escape them")

_CLOSER: Final = {quote: re.compile(rf"{quote}(?=\s*[,)\]}}:])") for quote in ("'", '"', "'''", '"""')}
_BRACKET_OR_QUOTE: Final = re.compile(r"[()\[\]{}]|'''|\"\"\"|'|\"")
_QUOTES: Final = re.compile(r"'''|\"\"\"|'|\"")
_PAIRS: Final = {")": "(", "]": "[", "}": "{"}
_OPENED: Final = {"(": "(", "t": "(", "T": "(", "[": "[", "{": "{", "d": "{", "s": "{"}
_FOLLOWER: Final = re.compile(r"\s*(?:[,)\]}:+\-*/%.<>\[&|]|[=!]=|(?:and|or|in|is|not|if|else|for)\b|\Z)")
_CODE_FOLLOWER: Final = re.compile(rf"{_FOLLOWER.pattern}|\s*(?:[;#\n]|\))")
_STRING_PREFIX: Final = re.compile(r"(?:\W|\A)[rRbBuUfF]{0,2}\Z")
_ONLY_OPENED: Final = re.compile(r"[,(]\s*\w+\s*=\s*\Z")
_BORDER: Final = re.compile(
    r"(?P<bracket>[\[\]{})]|(?<=[\w\])])\()"
    r"|,\s*(?:\w+\s*=\s*(?:['\"]|\Z)|['\"]\w*['\"]\s*:|(?P<quote>['\"]))"
    r"|['\"]\s*,\s*\w+\s*="
)
_NEXT_ITEM: Final = re.compile(r"\s*,\s*(?:[\w.\-/]+\s*\(|\{)")
_OPERATOR: Final = re.compile(
    r"\.\s*[^\W\d]\w*|\*\*|//|[=!<>:]=|<<|>>|->|[-+*/%@&|^<>=:]|(?:and|or|not\s+in|in|is\s+not|is|if|else|for)\b"
)
_UNARY: Final = re.compile(r"[-+~]|not\b")
_OPERAND: Final = re.compile(r"[^\W\d]\w*|[0-9][\w.]*|\.[0-9][\w.]*")
_SPACE: Final = re.compile(r"\s*")
_MAX_OPERATIONS: Final = 200
_MAX_OPEN: Final = 10_000


class Choice(NamedTuple):
    """A string, by where its body begins, and the quote that closes it; `earlier` are the choices before it."""

    body: int
    closer: int
    kind: str
    earlier: Choice | None


class Readings:
    """The ways of reading `text[start:end]` as a list of items.

    Args:
        max_steps: steps of reading and quotes tried, together; beyond, the text counts as ambiguous.
    """

    def __init__(self, text: str, start: int, end: int, max_steps: int) -> None:
        self._reader = ItemReader(text, end, max_steps=max_steps)
        self._text = text
        self._start = start
        self._end = end
        self._closers: dict[str, list[int]] = {}
        self._tried: set[tuple[object, ...]] = set()
        self._found: list[Choice | Problem | None] = []

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return self._reader.num_steps

    def only_one(self) -> list[Item] | Problem:
        """The items, if there is exactly one way of reading them."""
        try:
            self._read()
        except StepLimit:
            return AMBIGUOUS
        if not self._found:
            return Problem("syntax", "quotes inside a string are not escaped, and no way of closing it reads")
        found = self._found[0]
        if len(self._found) > 1:
            return AMBIGUOUS
        return found if isinstance(found, Problem) else self._read_as(found)

    def _read_as(self, choice: Choice | None) -> list[Item] | Problem:
        closers = {}
        while choice is not None:
            body = self._text[choice.body : choice.closer]
            if _ONLY_OPENED.search(body[-200:]):
                return NO_BORDER
            if swallows(body, choice.kind) or _is_triple_in_doubt(self._text, choice):
                return AMBIGUOUS
            closers[choice.body] = choice.closer
            choice = choice.earlier
        reader = ItemReader(self._text, self._end, max_steps=self._reader.max_steps, closers=closers)
        return reader.read_all(reader.start(self._start))

    def _read(self) -> None:
        """Note the readings that differ from the strict one in one string; failing that, in several strings."""
        try:
            self._reader.read_all(self._reader.start(self._start))
        except Break as reason:
            broken = list(self._repairs(reason, None))
        else:
            self._found.append(None)
            return
        if not self._found:
            self._read_deeper([iter(broken)])

    def _read_deeper(self, paths: list[Iterator[tuple[Break, Choice]]]) -> None:
        while paths and len(self._found) < 2:
            broken = next(paths[-1], None)
            if broken is None:
                paths.pop()
            else:
                paths.append(self._repairs(*broken))

    def _repairs(self, reason: Break, earlier: Choice | None) -> Iterator[tuple[Break, Choice]]:
        """Close the string in doubt in each possible way; yields the breaks that follow, notes the readings."""
        string = reason.string
        if string is None or self._is_expression(reason):
            self._note_if_complete(reason)
            return
        closers = self._closers_of(string.delimiter)
        for index in range(bisect_left(closers, string.body), len(closers)):
            self._reader.num_steps += 1
            yield from self._try(string, closers[index], earlier)

    def _try(self, string: OpenString, closer: int, earlier: Choice | None) -> Iterator[tuple[Break, Choice]]:
        before = string.state
        key = (closer, len(string.delimiter), before.frame.shape, before.key is None)
        if key in self._tried:
            # Two ways lead here: if one of them reads, so does the other.
            self._found += self._found[:1]
            return
        self._tried.add(key)
        choice = Choice(string.body, closer, before.frame.kind, earlier)
        try:
            self._reader.read_all(self._reader.close_string(string, closer))
        except Break as reason:
            if reason.string is None or self._is_expression(reason):
                self._note_if_complete(reason)
            elif reason.string.body != string.body:
                yield reason, choice
        else:
            self._found.append(choice)

    def _is_expression(self, reason: Break) -> bool:
        return may_be_expression(self._text, reason.state.at, self._end)

    def _note_if_complete(self, reason: Break) -> None:
        """Count a way that is damaged for another reason than quotes: it may be what the model meant."""
        at = reason.state.at
        self._reader.num_steps += (self._end - at) // 4
        if lexes_to_end(self._text, at, self._end, reason.state.frame.shape):
            self._found.append(reason.problem)

    def _closers_of(self, delimiter: str) -> list[int]:
        if delimiter not in self._closers:
            found, at = [], self._start
            while (match := _CLOSER[delimiter].search(self._text, at, self._end)) is not None:
                at = match.start() + 1
                if not _is_escaped(self._text, match.start()):
                    found.append(match.start())
            self._closers[delimiter] = found
        return self._closers[delimiter]


def _is_escaped(text: str, at: int) -> bool:
    stop = at
    while stop > 0 and text[stop - 1] == "\\":
        stop -= 1
    return (at - stop) % 2 == 1


def _is_triple_in_doubt(text: str, choice: Choice) -> bool:
    """Whether a repaired string between three quotes begins or ends in one more: nobody can tell which are its own."""
    quote = text[choice.closer]
    is_triple = text[choice.body - 3 : choice.body] == 3 * quote == text[choice.closer : choice.closer + 3]
    return is_triple and quote in (text[choice.body], text[choice.closer - 1])


def swallows(body: str, kind: str) -> bool:
    """Whether a repaired string holds what looks like the border of the next argument, entry, element or call.

    Between the brackets of a call (`plot(x, label='')`) it is part of the text, if the quotes there are those of code
    and no apostrophes. A bracket that the string did not open
    is the end of a call if a quote stands before it or another call after it (`'), g(`).

    Args:
        body: the string.
        kind: what it stands in, as in `Frame.kind`.
    """
    seen: list[str] = []
    has_inner = False
    num_open = dict.fromkeys("([{,", 0)
    for match in _BORDER.finditer(body):
        bracket = match["bracket"]
        if bracket is None:
            sign = "," if match["quote"] is None or kind != "(" else ""
        else:
            sign = bracket if bracket in "([{" else ""
        if sign:
            has_inner |= sign == "," and len(seen) > num_open[","]
            seen.append(sign)
            num_open[sign] += 1
        elif bracket is not None and not num_open[_PAIRS[bracket]]:
            if body[match.start() - 1 : match.start()] in ("'", '"') or _NEXT_ITEM.match(body, match.end()):
                return True
        elif bracket is not None:
            has_inner |= _NEXT_ITEM.match(body, match.end()) is not None
            closed = ""
            while closed != _PAIRS[bracket]:
                closed = seen.pop()
                num_open[closed] -= 1
    return num_open[","] > 0 or (has_inner and not are_quotes_of_code(body))


def are_quotes_of_code(text: str) -> bool:
    """Whether each quote opens or closes a string where code has one, and each bracket between strings has its pair."""
    at = 0
    outside = []
    while (match := _QUOTES.search(text, at)) is not None:
        outside.append(text[at : match.start()])
        closer = closing_quote(text, match.end(), len(text), match[0])
        at = closer + len(match[0])
        if closer < 0 or not _STRING_PREFIX.search(outside[-1][-3:]) or not _CODE_FOLLOWER.match(text, at):
            return False
    rest = "".join(outside) + text[at:]
    return skip_brackets(rest, 0, len(rest), []) == len(rest)


def lexes_to_end(text: str, at: int, end: int, shape: str) -> bool:
    """Whether brackets and strings, read strictly from `at`, are all closed at `end`.

    Args:
        shape: the brackets that are open at `at`, as in `Frame.shape`.
    """
    return skip_brackets(text, at, end, [_OPENED[kind] for kind in shape[1:]]) == end


def skip_brackets(text: str, at: int, end: int, opened: list[str], *, only_one: bool = False) -> int:
    """Where the `opened` brackets are closed, -1 if they are not or if a string does not end where one can.

    Args:
        only_one: stop where the last of them is closed; otherwise go on to `end`.
    """
    while (match := _BRACKET_OR_QUOTE.search(text, at, end)) is not None:
        sign, at = match[0], match.end()
        if sign in "([{":
            opened.append(sign)
            if len(opened) > _MAX_OPEN:
                return -1
        elif sign in _PAIRS:
            if not opened or opened.pop() != _PAIRS[sign]:
                return -1
            if only_one and not opened:
                return at
        else:
            closer = closing_quote(text, at, end, sign)
            at = closer + len(sign)
            if closer < 0 or _FOLLOWER.match(text, at, end) is None:
                return -1
    return -1 if opened or only_one else end


def are_quotes_plausible(text: str) -> bool:
    """Whether each string, read strictly, ends where one can before more text; the last may be open."""
    at = 0
    while (match := _QUOTES.search(text, at)) is not None:
        closer = closing_quote(text, match.end(), len(text), match[0])
        if closer < 0:
            return True
        at = closer + len(match[0])
        if at == len(text) or _FOLLOWER.match(text, at) is None:
            return False
    return True


def may_be_expression(text: str, at: int, end: int) -> bool:
    """Whether what follows a string at `at` can be Python's: an operator, operands, up to a comma or bracket.

    `'a' + b` is an expression, and refused. `'find -name '*.py' -type f'` is not: only quotes explain it.
    """
    depth = 0
    is_operand_due = False
    for _ in range(_MAX_OPERATIONS):
        at = _after_space(text, at, end)
        if at == end:
            return depth == 0 and not is_operand_due
        sign = text[at]
        if is_operand_due and sign in "'\"":
            return True
        if sign in ")]}," and depth == 0:
            return not is_operand_due
        if sign in "([{" and (is_operand_due or sign != "{"):
            depth, at, is_operand_due = depth + 1, at + 1, True
        elif sign in ")]}":
            depth, at, is_operand_due = depth - 1, at + 1, False
        elif sign == ",":
            at, is_operand_due = at + 1, True
        else:
            matched = _operation(text, at, end, is_operand_due)
            if matched is None:
                return False
            at, is_operand_due = matched
    return True


def _after_space(text: str, at: int, end: int) -> int:
    match = _SPACE.match(text, at, end)
    return at if match is None else match.end()


def _operation(text: str, at: int, end: int, is_operand_due: bool) -> tuple[int, bool] | None:
    """The end of the operator or operand at `at`, and whether an operand is due after it."""
    if not is_operand_due:
        match = _OPERATOR.match(text, at, end)
        return None if match is None else (match.end(), not match[0].startswith("."))
    match = _UNARY.match(text, at, end)
    if match is not None:
        return match.end(), True
    match = _OPERAND.match(text, at, end)
    return None if match is None else (match.end(), False)
