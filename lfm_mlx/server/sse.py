"""Server-sent events: a response that writes them as they come and notices that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip: it keeps proxies and clients from giving up on a silent connection."""


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """One event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """A response of events.

    It writes no faster than the client reads: what is not asked for stays where it is made. When the client goes away
    `events` is closed.

    Args:
        events: the events as bytes; closed in the end, whatever happens.
        on_end: called in the end, even where no event was ever asked for.
        keep_alive_s: seconds of silence after which a comment is sent.
        headers: further ones.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_end: Callable[[], None],
        *,
        keep_alive_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._events = events
        self._on_end = on_end
        self._keep_alive_s = keep_alive_s
        self._headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **(headers or {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await write_while_connected(self._write(send), receive, self._on_end)
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(_next(self._events))
                done, _ = await asyncio.wait({following}, timeout=self._keep_alive_s)
                if not done:
                    await _send_part(send, KEEP_ALIVE)
                    continue
                try:
                    part = following.result()
                except StopAsyncIteration:
                    break
                following = None
                await _send_part(send, part)
        finally:
            if following is not None and not following.done():
                following.cancel()
                await asyncio.wait({following})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await events.__anext__()


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


async def until_gone(receive: Receive) -> None:
    """Wait until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def write_while_connected(
    answer: Coroutine[Any, Any, None], receive: Receive, on_end: Callable[[], None] | None = None
) -> None:
    """Write an answer, which is cancelled when the client goes away.

    Args:
        answer: writes it.
        receive: the connection's.
        on_end: called when one of both has happened, or this was cancelled.
    """
    listening = asyncio.ensure_future(until_gone(receive))
    writing = asyncio.ensure_future(answer)
    try:
        await asyncio.wait({listening, writing}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if on_end is not None:
            on_end()
        listening.cancel()
        writing.cancel()
        await asyncio.wait({listening, writing})
    if not writing.cancelled() and (error := writing.exception()) is not None:
        raise error


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


async def while_connected(request: Request, work: Awaitable[_T], on_end: Callable[[], None]) -> _T:
    """The result of `work`, which is cancelled when the client goes away.

    Args:
        request: its body has been read.
        work: what is waited for.
        on_end: called in the end, even where the work was never begun.

    Raises:
        ClientGoneError: the client went away.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        on_end()
        listening.cancel()
        working.cancel()
        await asyncio.wait({working, listening})
