"""A user's grammar in Lark, checked for what llguidance, which calls itself at every level, does not survive."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from lfm_mlx.constrain.schema_check import check_compiles, check_schema
from lfm_mlx.errors import OptionError

MAX_LEVELS = 300
"""Of rules within rules and brackets within brackets; some thousands overflow the stack, which ends the process."""

_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')
_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^\n:]*:", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_]\w*")
_INLINE_SCHEMA = re.compile(r"%json\s*(?=[{\[])")


class _Rule(NamedTuple):
    names: frozenset[str]
    num_brackets: int


def check_lark(source: str) -> None:
    """Refuse a grammar that leads too deep, and schemas in it (`%json {...}`) that cannot be enforced.

    Raises:
        OptionError: naming the rule or the schema's keyword.
    """
    rules = _read_rules(_QUOTED.sub(" ", source))
    known: dict[str, int] = {}
    for name in rules:
        _count_levels(name, rules, known, 0)
    for match in _INLINE_SCHEMA.finditer(source):
        try:
            schema, _ = json.JSONDecoder().raw_decode(source, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong with it.
        check_schema(schema, "source: %json")
        check_compiles(schema, "source: %json")


def _read_rules(text: str) -> dict[str, _Rule]:
    heads = list(_RULE.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bodies = {head[1]: text[head.end() : end] for head, end in zip(heads, ends, strict=False)}
    return {
        name: _Rule(frozenset(_NAME.findall(body)) & bodies.keys(), _num_brackets(body))
        for name, body in bodies.items()
    }


def _num_brackets(body: str) -> int:
    """How many brackets stand within one another."""
    depth = deepest = 0
    for sign in re.findall(r"[()\[\]]", body):
        depth += 1 if sign in "([" else -1
        deepest = max(deepest, depth)
    return deepest


def _count_levels(name: str, rules: Mapping[str, _Rule], known: dict[str, int], depth: int) -> int:
    """Levels of a rule with those that it names."""
    if name not in known and depth <= MAX_LEVELS:
        known[name] = 0  # Leading back to it adds nothing.
        own = 1 + rules[name].num_brackets
        inner = (_count_levels(other, rules, known, depth + own) for other in rules[name].names)
        known[name] = own + max(inner, default=0)
    if depth + known.get(name, 0) > MAX_LEVELS:
        raise OptionError(f"source: the rule {name!r} leads more than {MAX_LEVELS} levels deep; make it flatter")
    return known[name]
