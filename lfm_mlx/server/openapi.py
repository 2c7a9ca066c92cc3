"""GET /openapi.json: what the endpoints take, from the same declarations that check it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.server.field_types import FieldType

API_VERSION = "1.0.0"

Handler = Callable[[Request], Awaitable[Response]]

_STATUSES = {
    400: "A field is wrong or not honoured; the message names it.",
    401: "The API key is missing or wrong.",
    403: "The page's origin may not call.",
    404: "There is no such model or response.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is encoded.",
    503: "There is no room now, or the server shuts down.",
    504: "The answer took too long.",
}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One path and method.

    Args:
        path: with {name} for a part that varies.
        handler: answers it.
        method: of HTTP.
        fields: of its body; None where it has none.
        streams: whether it may answer with events.
        media_type: of its answer.
    """

    path: str
    handler: Handler
    method: str = "GET"
    fields: FieldType | None = None
    streams: bool = False
    media_type: str = "application/json"


def describe_api(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of these endpoints."""
    paths: dict[str, Any] = {}
    for one in endpoints:
        path = one.path.replace(":path}", "}")
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, path)
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "lfm_mlx", "version": API_VERSION},
        "paths": paths,
        "components": {"schemas": {"Error": error}, "securitySchemes": schemes},
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _operation(one: Endpoint, path: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"} if one.media_type == "application/json" else {"type": "string"}
    answers = {one.media_type: {"schema": schema}}
    if one.streams:
        answers["text/event-stream"] = {"schema": {"type": "string"}}
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": answers}}
    if path.startswith("/health"):
        responses["503"] = {"description": _STATUSES[503], "content": answers}
    else:
        responses |= {str(code): {"description": text, "content": problem} for code, text in _STATUSES.items()}
    operation: dict[str, Any] = {
        "operationId": getattr(one.handler, "__name__", path),
        "summary": (inspect.getdoc(one.handler) or "").split("\n")[0],
        "responses": responses,
    }
    if one.fields is not None:
        body = {"application/json": {"schema": one.fields.schema()}}
        operation["requestBody"] = {"required": True, "content": body}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def openapi_endpoint(endpoints: Sequence[Endpoint]) -> Endpoint:
    """The endpoint that shows the document."""
    document = describe_api(endpoints)

    async def show_openapi(request: Request) -> Response:
        """This document."""
        return JSONResponse(document)

    return Endpoint(path="/openapi.json", handler=show_openapi)
