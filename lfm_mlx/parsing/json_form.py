"""The JSON form of a call: `{"name": "f", "arguments": {...}}`."""

from __future__ import annotations

from typing import Any, Final

from lfm_mlx.parsing.item_reader import Break, ItemReader
from lfm_mlx.parsing.literals import Problem

_ARGUMENT_KEYS: Final = ("arguments", "parameters")
_HARMLESS_KEYS: Final = {"name", "arguments", "parameters", "id", "type", "index"}


def call_of_object(value: dict[str, Any]) -> tuple[str, dict[str, Any]] | Problem:
    """The name and arguments of a call given as a JSON object.

    Taken are a bare object, OpenAI's `{"type": "function", "function": {...}}`, `parameters` in place of `arguments`,
    and arguments that are the text of a JSON object. The definition of a tool, with a schema, is no call.
    """
    inner = value.get("function")
    if isinstance(inner, dict) and set(value) <= {"function", "id", "type", "index"}:
        value = inner
    unknown = sorted(set(value) - _HARMLESS_KEYS)
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        return Problem("syntax", 'a JSON object is no call, expected {"name": "...", "arguments": {...}}')
    if unknown:
        return Problem("syntax", f"a JSON call has the key {unknown[0][:80]!r}, expected only name and arguments")
    given = [key for key in _ARGUMENT_KEYS if key in value]
    if len(given) > 1:
        return Problem("syntax", "a JSON call has both arguments and parameters, expected arguments")
    arguments = value[given[0]] if given else {}
    if isinstance(arguments, str):
        arguments = _read_object(arguments)
    if arguments is None:
        arguments = {}
    if isinstance(arguments, Problem):
        return arguments
    if not isinstance(arguments, dict):
        return Problem("syntax", f"the arguments of a JSON call are a {type(arguments).__name__}, expected an object")
    if given == ["parameters"] and arguments.get("type") == "object" and isinstance(arguments.get("properties"), dict):
        return Problem("syntax", "a tool's definition stands where a call was expected")
    return name, arguments


def _read_object(text: str) -> Any:
    """The JSON object that `text` consists of."""
    body = text.strip()
    if not body:
        return {}
    try:
        if not body.startswith("{"):
            raise ValueError
        item = ItemReader(body, len(body), max_steps=10 + len(body)).read_item(0)
    except (Break, ValueError):
        return Problem("syntax", "the arguments of a JSON call are text that is no JSON object")
    if item.end != len(body):
        return Problem("syntax", "text stands after the arguments of a JSON call")
    return item.arguments
