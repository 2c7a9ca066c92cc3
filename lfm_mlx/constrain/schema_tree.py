"""A JSON schema as a tree: its parts, their places, and what references lead to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from lfm_mlx.errors import OptionError

Schema = Mapping[str, Any] | bool

MAX_DEPTH = 64
MAX_CHAIN = 128
"""Levels with references followed: llguidance calls itself at each, and what overflows its stack ends the process."""

SCHEMA_KEYS = ("items", "additionalProperties")
SCHEMA_LIST_KEYS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMA_MAP_KEYS = ("properties", "patternProperties", "$defs", "definitions")
"""Where the parts of a schema stand: alone, in lists, by names."""

_DEFINITIONS = ("$defs/", "definitions/")
_INNER_KEYS = frozenset((*SCHEMA_KEYS, *SCHEMA_LIST_KEYS, *SCHEMA_MAP_KEYS))


def subschemas(schema: object, name: str = "schema") -> Iterator[tuple[str, object]]:
    """Every schema within `schema` with its JSON pointer, the outer ones first.

    Raises:
        OptionError: the nesting is deeper than 64.
    """
    waiting: list[tuple[str, object, int]] = [("", schema, 0)]
    while waiting:
        pointer, current, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise OptionError(f"{name}#{pointer} is nested more than {MAX_DEPTH} deep; move inner parts to $defs")
        yield pointer, current
        if isinstance(current, Mapping) and not _INNER_KEYS.isdisjoint(current):
            inner = [(f"{pointer}/{key}", value, depth + 1) for key, value in _inner_schemas(current)]
            waiting.extend(reversed(inner))


def _inner_schemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in schema.items():
        if key in SCHEMA_KEYS:
            yield key, value
        elif key in SCHEMA_LIST_KEYS and isinstance(value, Sequence) and not isinstance(value, str):
            yield from ((f"{key}/{index}", item) for index, item in enumerate(value))
        elif key in SCHEMA_MAP_KEYS and isinstance(value, Mapping):
            yield from ((f"{key}/{escape_pointer(part)}", item) for part, item in value.items())


def escape_pointer(part: str) -> str:
    """One step of a JSON pointer."""
    return part.replace("~", "~0").replace("/", "~1") if "~" in part or "/" in part else part


def resolve(reference: str, root: object) -> object:
    """What a reference such as `#/$defs/a` points to in `root`.

    Raises:
        LookupError: nothing is there.
    """
    current = root
    for step in reference[1:].split("/")[1:]:
        part = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(current, Mapping):
            current = current[part]
        elif isinstance(current, Sequence) and not isinstance(current, str) and part.isdecimal():
            current = current[int(part)]
        else:
            raise LookupError(part)
    return current


def count_levels(schema: object, root: object, name: str, known: dict[str, int] | None = None, depth: int = 0) -> int:
    """Levels of `schema` with references followed, each once.

    Args:
        schema: a part of `root`.
        root: where references point into.
        name: what the error calls it.
        known: levels behind the references that were followed before.
        depth: levels above the part.

    Raises:
        OptionError: they are too many.
    """
    known = {} if known is None else known
    deepest = 0
    waiting = [(schema, 0)]
    while waiting:
        current, level = waiting.pop()
        if not isinstance(current, Mapping):
            continue
        waiting += [(inner, level + 1) for key, inner in _inner_schemas(current) if not key.startswith(_DEFINITIONS)]
        reference = current.get("$ref")
        if isinstance(reference, str) and reference not in known and depth + level <= MAX_CHAIN:
            known[reference] = 0  # Leading back to it adds nothing.
            with contextlib.suppress(LookupError):  # What leads nowhere is named by its place.
                known[reference] = count_levels(resolve(reference, root), root, name, known, depth + level + 1)
        deepest = max(deepest, level, level + 1 + known.get(reference, 0) if isinstance(reference, str) else 0)
        if depth + deepest > MAX_CHAIN:
            raise OptionError(f"{name}: its references lead more than {MAX_CHAIN} levels deep; make it flatter")
    return deepest
