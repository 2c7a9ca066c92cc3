"""Carries out the calls of an answer; whatever goes wrong is handed back to the model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from lfm_mlx.chat.functions import FunctionTool, unicode_text
from lfm_mlx.chat.reply import ToolResult
from lfm_mlx.types import ToolCall

Confirm = Callable[[ToolCall], bool]
"""Asked before a tool that changes something is run; False tells the model that the user declined."""


class ToolRunner:
    """Runs calls of the functions among a chat's tools.

    Args:
        tools: as they were given to the chat.
        confirm: asked before a tool that changes something; None runs it.
    """

    def __init__(self, tools: Iterable[object], confirm: Confirm | None = None) -> None:
        self._functions = {one.name: one for one in map(_as_function, tools) if one is not None}
        self._confirm = confirm
        self._running: Future[str] | None = None
        self._is_cancelled = False

    @property
    def has_functions(self) -> bool:
        """Whether there is anything to run."""
        return bool(self._functions)

    def begin(self) -> None:
        """Forget an earlier `cancel`: another turn begins."""
        self._is_cancelled = False

    def can_run(self, calls: Iterable[ToolCall]) -> bool:
        """Whether all calls are of functions."""
        return all(call.name in self._functions for call in calls)

    def run(self, call: ToolCall, loop: asyncio.AbstractEventLoop | None = None) -> ToolResult:
        """The result of one call, an error's text where it fails.

        Args:
            call: of one of the functions.
            loop: the event loop, running in another thread, in which `async` functions are to run; None: their own.
        """
        function = self._functions[call.name]
        try:
            if function.changes_something and self._confirm is not None and not self._confirm(call):
                return ToolResult(call=call, content="The user declined this call.", is_error=True)
            return ToolResult(call=call, content=self._call(function, call, loop))
        except Exception as error:  # noqa: BLE001 - a tool is the user's code: the model is told what it raised
            return ToolResult(call=call, content=_error_text(error), is_error=True)

    def _call(self, function: FunctionTool, call: ToolCall, loop: asyncio.AbstractEventLoop | None) -> str:
        if loop is None or not inspect.iscoroutinefunction(function.function):
            return function.call(call.arguments)
        self._running = running = asyncio.run_coroutine_threadsafe(function.acall(call.arguments), loop)
        if self._is_cancelled:  # Between the start and the line above, `cancel` found nothing to end.
            running.cancel()
        try:
            return running.result()
        finally:
            self._running = None

    def cancel(self) -> None:
        """End the `async` function that runs in a loop, or is about to; others run to their end."""
        self._is_cancelled = True
        if (running := self._running) is not None:
            running.cancel()


def _error_text(error: Exception) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - so is its way of saying so
        text = "it has no text"
    return unicode_text(f"Error: {type(error).__name__}: {text}")


def _as_function(tool: object) -> FunctionTool | None:
    if isinstance(tool, FunctionTool):
        return tool
    is_definition = isinstance(tool, Mapping) or not callable(tool)
    return None if is_definition else FunctionTool.from_function(tool)  # type: ignore[arg-type]
