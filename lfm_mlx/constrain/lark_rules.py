"""Text of a grammar in llguidance's dialect of Lark, with equal rules written once."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from functools import lru_cache

# One for all: json.dumps makes a new one for each call that asks for other than ASCII.
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Irregular(Exception):  # noqa: N818 (an outcome of writing, not an error of the program)
    """What is to be written is no regular language."""


class LarkRules:
    """Rules by their bodies: asking for the same body twice gives the same name.

    What is a regular language is written as terminals within terminals, which are several times cheaper to compile than
    rules. The lexer takes the longest terminal and does not go back, so the two must not be alternatives that begin
    alike: a writer that meets `Irregular` sets `is_regular` to False and begins again.

    llguidance takes about a microsecond for each token of the text, a space included, and nearly nothing for the
    length of names and strings. So there is as little as possible between them.

    Attributes:
        is_regular: whether `rule` writes terminals, and what cannot be a terminal raises `Irregular`.
    """

    def __init__(self) -> None:
        self.is_regular = True
        self._written: tuple[dict[Hashable, str], dict[Hashable, str]] = ({}, {})
        self._names: dict[str, str] = {}
        self._lines: list[str] = []

    @property
    def written(self) -> dict[Hashable, str]:
        """The names of rules by what they were written from, for writers that meet the same thing again."""
        return self._written[self.is_regular]

    def rule(self, body: str) -> str:
        """The name of the rule with this body; a body that is a name already is its own."""
        return body if body.isalnum() else self._named(body, "T" if self.is_regular else "r")

    def leave_regular(self) -> None:
        """Say that what follows is no regular language.

        Raises:
            Irregular: it would have to be one.
        """
        if self.is_regular:
            raise Irregular

    def terminal(self, body: str) -> str:
        """The name of the terminal with this body; a terminal is one regular expression to the lexer."""
        return self._named(body, "T")

    def reserve(self) -> str:
        """A name for a rule that is defined later: how a rule refers to itself. Raises Irregular."""
        self.leave_regular()
        name = f"r{len(self._lines)}"
        self._lines.append("")
        return name

    def define(self, name: str, body: str) -> None:
        """Give a reserved name its body."""
        self._lines[int(name[1:])] = f"{name}:{body}"

    def text(self, name: str, body: str) -> str:
        """All rules, and one more with a name of its own."""
        return "\n".join([f"{name}:{body}", *self._lines])

    def _named(self, body: str, prefix: str) -> str:
        line = f":{body}"
        key = prefix + line
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"{prefix}{len(self._lines)}"
            self._lines.append(name + line)
        return name


@lru_cache(maxsize=4096)
def quoted(text: str) -> str:
    """`text` as a Lark string literal."""
    return _ENCODER.encode(text)


def either(bodies: Iterable[str]) -> str:
    """The alternatives, each once, in parentheses where there are several."""
    choices = list(dict.fromkeys(bodies))
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"


def glued(first: str, second: str) -> str:
    """One body after the other, a space between them only where they would be read as one name (`a b`, `a? b`)."""
    if not first or not second:
        return first or second
    needs_space = second[0].isalnum() and (first[-1].isalnum() or (first[-1] == "?" and second[0] == "r"))
    return f"{first} {second}" if needs_space else first + second


@lru_cache(maxsize=1024)
def pattern(regex: str) -> str:
    """A regular expression as a Lark literal."""
    return "/" + re.sub(r"(?<!\\)/", r"\\/", regex) + "/"
