"""The body of a request, read within limits, as JSON."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lfm_mlx.server.http_errors import RETRY_AFTER_S, ApiError, Dialect

MAX_DEPTH = 64
"""Levels of lists and objects: tool schemas need a dozen."""

PARSE_IN_THREAD_BYTES = 256 << 10
"""Bodies from here on are parsed beside the event loop, which serves the others meanwhile."""

DRAIN_S, DRAIN_SILENCE_S = 10.0, 1.0
"""How long the rest of a refused body is thrown away, so that its sender comes to read the answer; and how long its
sender may be silent meanwhile."""

_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(rb"(?<!\d)\d{309}")
"""Shorter whole numbers are floats too."""

Read = TypeVar("Read")

UNCOUNTED_BYTES = 256 << 10
"""The beginning of a body needs no room among the others: ordinary requests are taken while large ones come in."""


class BodyRoom:
    """Counts the bytes of all bodies that are being read: many large ones at once are not to fill the memory.

    Args:
        max_bytes: of all together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def take(self, held: int, more: int) -> None:
        """Count some more of a body of which `held` bytes are here.

        Raises:
            BodyRefusedError: they are too many.
        """
        added = _counted(held + more) - _counted(held)
        if self.num_bytes + added > self.max_bytes:
            raise BodyRefusedError(
                f"the bodies that are being read have {self.num_bytes:,} bytes together, expected at most "
                f"{self.max_bytes:,}; try again later",
                status=503,
                code="overloaded",
                headers={"retry-after": str(RETRY_AFTER_S)},
                closes=True,
            )
        self.num_bytes += added

    def give(self, held: int) -> None:
        """A body of so many bytes is held no more."""
        self.num_bytes -= _counted(held)


def _counted(num_bytes: int) -> int:
    return max(num_bytes - UNCOUNTED_BYTES, 0)


async def read_json(
    request: Request, read: Callable[[object], Read], *, max_bytes: int, timeout_s: float, room: BodyRoom
) -> Read:
    """What `read` makes of the JSON value that a request carries; of a large one, beside the event loop.

    Raises:
        ApiError: it is too large, too slow, nested too deeply, or no JSON; or there is no room for it now.
    """
    body = await read_body(request, max_bytes=max_bytes, timeout_s=timeout_s, room=room)
    try:
        if len(body) >= PARSE_IN_THREAD_BYTES:
            return await asyncio.to_thread(lambda: read(parse_json(body)))
        return read(parse_json(body))
    finally:
        room.give(len(body))


async def read_body(request: Request, *, max_bytes: int, timeout_s: float, room: BodyRoom) -> bytes:
    """The bytes of a body, which the caller gives back to the room; one that is too large is never held as a whole.

    Raises:
        BodyRefusedError: it is encoded, or too large, by what it announces or by what came, or takes too long, or there
            is no room.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BodyRefusedError(
            f"the body is encoded as {encoding[:80]!r}, expected plain JSON; send it without content-encoding",
            status=415,
            code="unsupported_encoding",
            closes=True,
        )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(int(announced), max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with _Deadline(timeout_s):
            async for part in request.stream():
                if num_bytes + len(part) > max_bytes:
                    raise _too_large(num_bytes + len(part), max_bytes)
                room.take(num_bytes, len(part))
                num_bytes += len(part)
                parts.append(part)
    except BaseException as error:
        room.give(num_bytes)
        if isinstance(error, asyncio.TimeoutError):
            raise _too_slow(timeout_s) from None
        raise
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        ApiError: it is no JSON, or nested too deeply, or has text that is no Unicode.
    """
    parse_int = _finite_integer if _LONG_NUMBER.search(body) else None
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, parse_int=parse_int
        )
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise ApiError(f"the body has a byte at {error.start} that is no UTF-8, expected JSON in UTF-8") from None
    except ValueError as error:
        raise ApiError(f"the body is no JSON: {error}; expected a JSON object", code="invalid_json") from None
    _check_tree(value, checks_text=_HALF_SURROGATE.search(body) is not None)
    return value


def _check_tree(value: Any, *, checks_text: bool) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise _too_deep()
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following += item.values()
                if checks_text:
                    following += item
            elif isinstance(item, list):
                following += item
            elif checks_text and isinstance(item, str):
                _check_text(item)
        level = [item for item in following if checks_text or isinstance(item, (dict, list))]
        depth += 1


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            f"the body has a string with half a surrogate pair, {text[error.start]!r}, expected Unicode; replace it",
            code="invalid_json",
        ) from None


def _too_deep() -> ApiError:
    return ApiError(
        f"the body is nested more than {MAX_DEPTH} levels deep, expected fewer; flatten it", code="invalid_json"
    )


def _too_large(num_bytes: int, max_bytes: int) -> BodyRefusedError:
    return BodyRefusedError(
        f"the body has {num_bytes:,} bytes or more, expected at most {max_bytes:,}; send less or start the server with "
        "a larger --max-body-mb",
        status=413,
        code="body_too_large",
        closes=True,
    )


def _too_slow(timeout_s: float) -> BodyRefusedError:
    return BodyRefusedError(
        f"the body did not arrive within {timeout_s:g} s, expected it faster; send it again, or start the server with "
        "a larger --body-timeout",
        status=408,
        code="timeout",
        closes=True,
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _finite_integer(text: str) -> int:
    _finite(text)
    return int(text)


class BodyRefusedError(ApiError):
    """A body that is not read to its end: the answer does not wait for it, and the connection ends."""

    def response(self, dialect: Dialect, request_id: str | None = None) -> JSONResponse:
        """The whole answer."""
        return _EarlyResponse(self.body(dialect, request_id), self.status, headers=self.headers)


class _EarlyResponse(JSONResponse):
    """Sent while the request is still on its way; a connection closed at once would take the answer with it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await _drain(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    """Read and forget the rest of a body, for a while."""
    end_s = time.monotonic() + DRAIN_S
    while time.monotonic() < end_s:
        try:
            message = await asyncio.wait_for(receive(), DRAIN_SILENCE_S)
        except asyncio.TimeoutError:
            return
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


class _Deadline:
    """`async with` that is left with TimeoutError after some seconds; asyncio.timeout came with Python 3.11."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._is_late = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def _end(self) -> None:
        self._is_late = True
        self._task.cancel()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._timer.cancel()
        if self._is_late and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError from None
