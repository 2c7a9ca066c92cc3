"""Text of a grammar in llguidance's dialect of Lark, with equal rules written once."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from functools import lru_cache

# One for all: json.dumps makes a new one for each call that asks for other than ASCII.
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class LarkRules:
    """Rules by their bodies: asking for the same body twice gives the same name.

    Attributes:
        written: the names of rules by what they were written from, for writers that meet the same thing again.
    """

    def __init__(self) -> None:
        self.written: dict[Hashable, str] = {}
        self._names: dict[str, str] = {}
        self._lines: list[str] = []

    def rule(self, body: str) -> str:
        """The name of the rule with this body; a body that is a name already is its own."""
        return body if body.isalnum() else self._named(body, "r")

    def terminal(self, body: str) -> str:
        """The name of the terminal with this body; a terminal is one regular expression to the lexer."""
        return self._named(body, "T")

    def reserve(self) -> str:
        """A name for a rule that is defined later: how a rule refers to itself."""
        name = f"r{len(self._lines)}"
        self._lines.append("")
        return name

    def define(self, name: str, body: str) -> None:
        """Give a reserved name its body."""
        self._lines[int(name[1:])] = f"{name}: {body}"

    def text(self, name: str, body: str) -> str:
        """All rules, and one more with a name of its own."""
        return "\n".join([f"{name}: {body}", *self._lines])

    def _named(self, body: str, prefix: str) -> str:
        key = f"{prefix}: {body}"
        if key not in self._names:
            self._names[key] = f"{prefix}{len(self._lines)}"
            self._lines.append(f"{self._names[key]}: {body}")
        return self._names[key]


@lru_cache(maxsize=4096)
def quoted(text: str) -> str:
    """`text` as a Lark string literal."""
    return _ENCODER.encode(text)


def either(bodies: Iterable[str]) -> str:
    """The alternatives, each once, in parentheses where there are several."""
    choices = list(dict.fromkeys(bodies))
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


@lru_cache(maxsize=1024)
def pattern(regex: str) -> str:
    """A regular expression as a Lark literal."""
    return "/" + re.sub(r"(?<!\\)/", r"\\/", regex) + "/"
