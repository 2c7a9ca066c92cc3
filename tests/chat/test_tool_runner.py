"""Carrying out calls: what is cancelled in the moment in which it begins."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from lfm_mlx.chat import tool_runner
from lfm_mlx.chat.tool_runner import ToolRunner
from lfm_mlx.types import ToolCall

CALL = ToolCall(id="call_1", name="wait", arguments={})


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_function_cancelled_while_it_is_being_started_ends(
    monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    started, released = threading.Event(), asyncio.Event()

    async def wait() -> str:
        """Wait until released."""
        started.set()
        await released.wait()
        return "came to its end"

    def start_slowly(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        future = start(coroutine, loop)
        assert started.wait(30)
        if is_cancelled:
            runner.cancel()
        else:
            loop.call_soon_threadsafe(released.set)
        return future

    async def run() -> str:
        result = await asyncio.wait_for(asyncio.to_thread(runner.run, CALL, asyncio.get_running_loop()), 30)
        return result.content

    start = asyncio.run_coroutine_threadsafe
    runner = ToolRunner([wait])
    monkeypatch.setattr(tool_runner.asyncio, "run_coroutine_threadsafe", start_slowly)
    content = asyncio.run(run())
    assert ("CancelledError" in content) is is_cancelled
    assert (content == "came to its end") is not is_cancelled


def test_a_cancel_is_forgotten_when_the_next_turn_begins() -> None:
    async def answer() -> str:
        """Answer."""
        return "fine"

    async def run() -> str:
        return (await asyncio.to_thread(runner.run, CALL, asyncio.get_running_loop())).content

    runner = ToolRunner([answer])
    runner._functions["wait"] = runner._functions.pop("answer")
    runner.cancel()
    runner.begin()
    assert asyncio.run(run()) == "fine"
