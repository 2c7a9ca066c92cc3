"""A block of tool calls into calls that can be executed and errors that can be shown."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

from lfm_mlx.parsing.call_list import CallReading, UnreadCall, read_call_list
from lfm_mlx.parsing.literals import Problem
from lfm_mlx.parsing.quotes import NO_BORDER
from lfm_mlx.parsing.router import Span
from lfm_mlx.parsing.schemas import ToolSchema, checked_arguments
from lfm_mlx.types import CallError, ToolCall


def new_call_id() -> str:
    """An id that no other call has: "call_" and 24 characters that are safe in a URL."""
    return "call_" + secrets.token_urlsafe(18)


def read_block(
    block: Span, schemas: Mapping[str, ToolSchema] | None, new_id: Callable[[], str]
) -> list[ToolCall | CallError]:
    """The calls of a block in order, each by itself: executable, or an error."""
    if block.end == "ambiguous":
        return [CallError(code=NO_BORDER.code, message=NO_BORDER.message, text=block.payload.strip())]
    payload = block.payload
    if block.end == "overtaken" and not payload.rstrip().endswith("]"):
        message = "another block begins before the list of calls is closed, expected ] and the end marker"
        return [CallError(code="truncated", message=message, text=payload.strip())]
    readings = block.readings or read_call_list(payload, is_closed=block.end == "closed")
    if not readings:
        return [CallError(code="empty", message="there is no call between the markers", text=payload.strip())]
    return [_checked(payload, reading, schemas, new_id) for reading in readings]


def _checked(
    payload: str, reading: CallReading, schemas: Mapping[str, ToolSchema] | None, new_id: Callable[[], str]
) -> ToolCall | CallError:
    text = payload[reading.start : reading.end]
    if isinstance(reading, UnreadCall):
        code, message = reading.problem
        return CallError(code=code, message=message, text=text, name=reading.name)
    arguments = checked_arguments(reading.name, reading.values, reading.arguments, schemas)
    if isinstance(arguments, Problem):
        given = None if reading.values else reading.arguments
        code, message = arguments
        return CallError(code=code, message=message, text=text, name=reading.name, arguments=given)
    return ToolCall(id=new_id(), name=reading.name, arguments=arguments, text=text)
