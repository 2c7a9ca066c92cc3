"""Calls written in the model's own Pythonic form, so that reading them gives the same calls."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Final

from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.item_reader import ARGUMENT_NAME, CALL_NAME
from lfm_mlx.parsing.literals import MAX_INT_BITS
from lfm_mlx.tokenizer import special
from lfm_mlx.types import ToolCall

_ESCAPES: Final = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_TO_ESCAPE: Final = re.compile(r"[\\'\n\r\t\x00-\x1f\x7f]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_CONSTANTS: Final = {True: "True", False: "False", None: "None"}


def render_calls(calls: Iterable[ToolCall]) -> str:
    """`<|tool_call_start|>[f(a=1), g()]<|tool_call_end|>`.

    Raises:
        OptionError: a name is none, or a value has no JSON form.
    """
    listed = ", ".join(_render_call(call) for call in calls)
    return f"{special.TOOL_CALL_START}[{listed}]{special.TOOL_CALL_END}"


def render_value(value: Any) -> str:
    """A JSON value as a Python literal, strings in single quotes.

    Raises:
        OptionError: the value has no JSON form.
    """
    if isinstance(value, bool) or value is None:
        return _CONSTANTS[value]
    if isinstance(value, str) and not _SURROGATE.search(value):
        return "'" + _TO_ESCAPE.sub(_escaped, value) + "'"
    if isinstance(value, int) and value.bit_length() <= MAX_INT_BITS:
        return repr(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(render_value, value)) + "]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return "{" + ", ".join(f"{render_value(key)}: {render_value(entry)}" for key, entry in value.items()) + "}"
    raise OptionError(f"an argument holds a {type(value).__name__} that has no JSON form, expected a JSON value")


def _render_call(call: ToolCall) -> str:
    if CALL_NAME.fullmatch(call.name) is None:
        raise OptionError(f"a call has the name {call.name[:100]!r}, expected letters, digits, _, -, . and /")
    named = {key: value for key, value in call.arguments.items() if ARGUMENT_NAME.fullmatch(key)}
    other = {key: value for key, value in call.arguments.items() if key not in named}
    parts = [f"{key}={render_value(value)}" for key, value in named.items()]
    parts += [f"**{render_value(other)}"] if other else []
    return f"{call.name}({', '.join(parts)})"


def _escaped(match: re.Match[str]) -> str:
    sign = match[0]
    return _ESCAPES.get(sign) or f"\\x{ord(sign):02x}"
