"""Who may call, under which id, and what the log says about it: the outermost layer of the server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm_mlx.server.chat_page import STATIC_PREFIX
from lfm_mlx.server.http_errors import ApiError, as_api_error, closing_error, dialect_of
from lfm_mlx.server.sse import ClientGoneError

OPEN_PATHS = frozenset({"/", "/health", "/health/live", "/health/ready"})
"""What needs no key; nor do the files of the chat page, which asks for one itself."""

CLIENT_GONE = 499
"""The status in the log of a request whose client went away; nobody receives it."""

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
log = logging.getLogger("lfm_mlx.server")


class Access:
    """Checks keys and origins, gives every request an id, logs and counts it, and answers for errors.

    Args:
        app: what is behind.
        api_keys: one of them has to come with every request; none lets everybody in.
        cors_origins: pages of which sites may call; "*" is all.
        count_http: called with method, path of the route and status of every request that was answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        cors_origins: Sequence[str],
        count_http: Callable[[str, str, int], None],
    ) -> None:
        self._app = app
        self._cors_origins = cors_origins
        self._count_http = count_http
        self._key_hashes = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given_id = headers.get("x-request-id", "")
        scope["request_id"] = given_id if _REQUEST_ID.fullmatch(given_id) else f"req_{uuid.uuid4().hex}"
        started_s, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own_id = scope["request_id"].encode()
                # OpenAI's clients read the one, Anthropic's the other.
                named = [(b"x-request-id", own_id), (b"request-id", own_id)]
                given = list(message.get("headers", ()))
                message["headers"] = [*given, *named, *self._opening(headers.get("origin"), given)]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, sending)
        except (ClientGoneError, ClientDisconnect):
            status = CLIENT_GONE
        except (Exception, asyncio.CancelledError) as error:
            # The last place where a client can be told. Cancelled is what outlasts the time that the server has to end.
            api_error = as_api_error(error) if isinstance(error, Exception) else closing_error()
            if api_error.status == 500:
                log.error("failed", exc_info=error, extra={"fields": {"id": scope["request_id"]}})
            if status == 0:
                dialect = dialect_of(scope["path"])
                await api_error.response(dialect, scope["request_id"])(scope, receive, sending)
        finally:
            self._note(scope, status or CLIENT_GONE, time.monotonic() - started_s)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is not None and not self._is_known(origin, headers.get("host", "")):
            raise ApiError(
                f"origin is {origin[:200]!r}, expected a page of this server; start it with --cors-origin and that "
                "origin to let its pages in",
                status=403,
                code="origin_refused",
            )
        if self._key_hashes and not _is_open(scope["path"]) and scope["method"] != "OPTIONS":
            given = _digest(_given_key(headers))
            matches = [hmac.compare_digest(given, known) for known in self._key_hashes]
            if not any(matches):
                raise ApiError(
                    "the API key is missing or wrong, expected one of this server's in the header "
                    "'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                    status=401,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )

    def _opening(self, origin: str | None, given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """What lets a page that may call read an answer from here, where the layer behind has not said so."""
        allowed = self._cors_origins
        is_said = any(name == b"access-control-allow-origin" for name, _ in given)
        if origin is None or is_said or not ("*" in allowed or origin in allowed):
            return []
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]

    def _is_known(self, origin: str, host: str) -> bool:
        """Whether a browser's page may call. Without keys, a page whose name was made to lead here may not either."""
        allowed = self._cors_origins
        if "*" in allowed or origin in allowed:
            return True
        try:
            name = urlsplit(origin).hostname or ""
        except ValueError:
            return False
        is_same = urlsplit(origin).netloc == host
        return is_same and (bool(self._key_hashes) or _is_address(name) or name.endswith(".local"))

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "unknown")
        # A monitor keeps every name for good, and clients may make names up.
        self._count_http(scope["method"] if scope["method"] in _METHODS else "other", path, status)
        level = logging.DEBUG if _is_open(path) else logging.INFO
        fields = {
            "id": scope["request_id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            **scope.get("log_fields", {}),
        }
        log.log(level, "request", extra={"fields": fields})


def read_keys(texts: Sequence[str]) -> tuple[str, ...]:
    """The keys in some texts, one a line; empty lines and those with # in front are none."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return tuple(line for line in lines if line and not line.startswith("#"))


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(STATIC_PREFIX)


def _digest(key: str) -> bytes:
    """Keys are compared by digest: equal lengths, whatever was sent."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _given_key(headers: dict[str, str]) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")


def _is_address(name: str) -> bool:
    return name in _LOCAL_HOSTS or re.fullmatch(r"[\d.]+|[\da-f:]+", name) is not None
