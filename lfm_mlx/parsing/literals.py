"""Strings and numbers as models write them in tool calls: Python's literals, read without `ast`."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Final, NamedTuple

MAX_INT_BITS: Final = 14_000
"""About 4,200 decimal digits: Python refuses to print or read integers of more than 4,300."""


class Problem(NamedTuple):
    """Stands where a value would: the text was understood, and has no value that may be executed."""

    code: str
    message: str


_NEXT_SIGN: Final = {quote: re.compile(rf"[\\{quote}]") for quote in "'\""}
_ESCAPE: Final = re.compile(
    r"\\(?:(?P<newline>\r\n|[\r\n])|(?P<octal>[0-7]{1,3})|x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})"
    r"|U(?P<U>[0-9a-fA-F]{8})|N\{(?P<N>[^{}\r\n]{1,100})\}|(?P<sign>.))",
    re.DOTALL,
)
_PYTHON_SIGNS: Final = {
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}
_JSON_SIGNS: Final = {sign: _PYTHON_SIGNS[sign] for sign in "\\'\"bfnrt"} | {"/": "/"}
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_NUMBER: Final = re.compile(
    r"(?P<sign>[+-]?)\s*(?:0[xX](?P<hex>_?[0-9a-fA-F]+(?:_[0-9a-fA-F]+)*)|0[oO](?P<oct>_?[0-7]+(?:_[0-7]+)*)"
    r"|0[bB](?P<bin>_?[01]+(?:_[01]+)*)|(?P<int>[0-9]+(?:_[0-9]+)*)(?![\w.])"
    r"|(?P<float>(?:[0-9]+(?:_[0-9]+)*(?:\.(?:[0-9]+(?:_[0-9]+)*)?)?|\.[0-9]+(?:_[0-9]+)*)"
    r"(?:[eE][+-]?[0-9]+(?:_[0-9]+)*)?))"
    r"(?![\w.])"
)
_BASES: Final = {"hex": 16, "oct": 8, "bin": 2}


def closing_quote(text: str, start: int, end: int, delimiter: str) -> int:
    """Where a string whose body begins at `start` is closed, -1 if it is not closed before `end`."""
    next_sign = _NEXT_SIGN[delimiter[0]]
    at = start
    while (match := next_sign.search(text, at, end)) is not None:
        at = match.start()
        if text[at] == "\\":
            at += 2
        elif text.startswith(delimiter, at, end):
            return at
        else:
            at += 1
    return -1


def string_value(prefix: str, body: str, *, is_triple: bool = False, is_json: bool = False) -> str | Problem:
    """What a string literal means.

    Newlines and control characters inside quotes are kept as they are. A backslash that begins no escape is a
    backslash. A damaged escape (`\\Users`) is text as well, unless the same string holds escapes: then nobody can say
    which of the two was meant. The same goes for escapes beside a newline that is none.

    Args:
        prefix: the letters before the quote, such as "r".
        body: what stands between the quotes.
        is_triple: whether three quotes stand on each side.
        is_json: whether only JSON's escapes count.
    """
    kinds = prefix.lower()
    if kinds not in ("", "r", "u", "f", "fr", "rf"):
        return Problem("no_json_form", f"the literal {prefix}'...' has no JSON form, expected a plain string")
    if "f" in kinds and ("{" in body or "}" in body):
        return Problem("not_literal", "an f-string with placeholders is no literal, expected a plain string")
    value = body
    if "\\" in body and "r" not in kinds:
        unescaped = _unescape(body, is_triple, is_json)
        if isinstance(unescaped, Problem):
            return unescaped
        value = unescaped
    return _join_surrogates(value) if _SURROGATE.search(value) else value


def number_at(text: str, start: int, end: int) -> tuple[int | float | Problem, int] | None:
    """The number at `start` and where it ends; None where no number stands there.

    Leading zeros are decimal (`07` is 7). Complex and infinite numbers are problems.
    """
    match = _NUMBER.match(text, start, end)
    if match is None:
        return None
    group = match.lastgroup or ""
    digits = match[group].replace("_", "")
    value: int | float
    if group == "float":
        value = float(digits)
        if not math.isfinite(value):
            return Problem("no_json_form", "the number is too large for JSON, expected a finite one"), match.end()
    else:
        base = _BASES.get(group, 10)
        if len(digits) * math.log2(base) > MAX_INT_BITS:
            return Problem("no_json_form", f"an integer of {len(digits)} digits is too long"), match.end()
        value = int(digits, base)
    return (-value if match["sign"] == "-" else value), match.end()


def _unescape(body: str, is_triple: bool, is_json: bool) -> str | Problem:
    signs = _JSON_SIGNS if is_json else _PYTHON_SIGNS
    num_known = num_damaged = num_joined = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal num_known, num_damaged, num_joined
        value = _json_escape(match) if is_json else _python_escape(match)
        if value is None and match["sign"] is not None:
            sign = match["sign"]
            value = signs.get(sign)
            if value is None:
                num_damaged += sign in "xuUN" and not (is_json and sign != "u")
                return match[0]
            num_known += sign not in "\"'"
        elif value is None:
            num_damaged += 1
            return match[0]
        else:
            num_known += 1
            num_joined += match["newline"] is not None
        return value

    value = _ESCAPE.sub(replace, body)
    if num_damaged and num_known:
        return Problem(
            "ambiguous_escape", "a string holds both escapes and damaged escapes, write \\\\ for a backslash"
        )
    if num_known and not is_triple and len(re.findall(r"\r\n|[\r\n]", body)) > num_joined:
        return Problem("ambiguous_escape", "a string holds both escapes and newlines that are not escaped, write \\n")
    return value


def _python_escape(match: re.Match[str]) -> str | None:
    """The meaning of a numbered, named or newline escape; None for a damaged one or another kind."""
    if match["newline"] is not None:
        return ""
    if match["octal"] is not None:
        return chr(int(match["octal"], 8))
    if match["N"] is not None:
        try:
            return unicodedata.lookup(match["N"])
        except KeyError:
            return None
    digits = match["x"] or match["u"] or match["U"]
    code = int(digits, 16) if digits is not None else -1
    return chr(code) if 0 <= code <= 0x10FFFF else None


def _json_escape(match: re.Match[str]) -> str | None:
    return chr(int(match["u"], 16)) if match["u"] is not None else None


def _join_surrogates(value: str) -> str | Problem:
    """Make one character of each pair of surrogates, as JSON's escapes mean it."""
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return Problem("no_json_form", "half a surrogate pair is no character, expected Unicode text")
