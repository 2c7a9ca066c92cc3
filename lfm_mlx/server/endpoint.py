"""What every endpoint does alike: its service, its fields, its errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any, cast

from starlette.requests import Request

from lfm_mlx.server.field_types import Fields
from lfm_mlx.server.http_errors import as_api_error, dialect_of
from lfm_mlx.server.model_service import Service
from lfm_mlx.server.request_body import read_json
from lfm_mlx.server.sse import event

log = logging.getLogger("lfm_mlx.server")


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return cast(Service, request.app.state.service)


def request_id(request: Request) -> str:
    """The id under which a request is logged."""
    return str(request.scope.get("request_id", ""))


async def read_fields(request: Request, fields: Fields) -> dict[str, Any]:
    """The checked fields of a request.

    Raises:
        ApiError: the body or a field is refused.
    """
    service = service_of(request)
    limit, timeout_s = service.settings.max_body_bytes, service.settings.body_timeout_s

    def read(body: object) -> dict[str, Any]:
        found: dict[str, Any] = fields.read(body, "")
        return found

    return await read_json(request, read, max_bytes=limit, timeout_s=timeout_s, room=service.bodies)


def log_failure(error: Exception, logged_id: str) -> None:
    """Log an error that is the server's fault."""
    if as_api_error(error).status == 500:
        log.error("failed", exc_info=error, extra={"fields": {"id": logged_id}})


async def stream_errors(request: Request, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """A stream of events in which an error is one more, the last."""
    try:
        async with contextlib.aclosing(events):
            async for one in events:
                yield one
    except Exception as error:  # noqa: BLE001 - the status line is gone; here a client can still be told
        log_failure(error, request_id(request))
        dialect = dialect_of(request.url.path)
        name = "error" if dialect == "anthropic" else None
        yield event(as_api_error(error).body(dialect, request_id(request)), name)
