"""Errors as clients of OpenAI's and Anthropic's interfaces know them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from starlette.responses import JSONResponse

from lfm_mlx.errors import (
    ContextLengthError,
    EngineClosedError,
    LfmError,
    MemoryPlanError,
    OptionError,
    QueueFullError,
    TemplateError,
)
from lfm_mlx.types import SamplingParams

Dialect = Literal["openai", "anthropic"]
"""Whose interface a path belongs to."""

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error"}
_FIELDS = (
    *SamplingParams.names(),
    "messages",
    "tools",
    "tool_choice",
    "max_tokens",
    "stop",
    "thinking_budget",
    "prompt",
)
_FIRST_NAME = re.compile(rf"^({'|'.join(_FIELDS)})((?:\[\d+\]|\.[a-z_]+)*)(?!\w)")
"""The field that a message of ours begins with."""

RETRY_AFTER_S = 2
"""What a client that found no room is told to wait, in seconds."""


class ApiError(LfmError):
    """A request that is answered with an error.

    Args:
        message: what was found, what was expected, what to do.
        status: of HTTP.
        param: the field of the request that is meant, as a path.
        code: one word for programs.
        headers: to go with the answer.
        closes: whether the connection ends with the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {**(headers or {}), **({"connection": "close"} if closes else {})}

    def body(self, dialect: Dialect, request_id: str | None = None) -> dict[str, Any]:
        """The JSON object that tells a client."""
        fallback = "invalid_request_error" if self.status < 500 else "api_error"
        if dialect == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, fallback)
            return {"type": "error", "error": {"type": kind, "message": str(self)}, "request_id": request_id}
        kind = _OPENAI_TYPES.get(self.status, fallback)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self, dialect: Dialect, request_id: str | None = None) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(dialect, request_id), self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error; of one that nobody foresaw, nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, ContextLengthError):
        return ApiError(text, param="messages", code="context_length_exceeded")
    if isinstance(error, MemoryPlanError):
        return ApiError(text, status=503, code="out_of_memory", headers={"retry-after": str(RETRY_AFTER_S)})
    if isinstance(error, QueueFullError):
        wait_s = math.ceil(error.retry_after_s)
        return ApiError(text, status=503, code="queue_full", headers={"retry-after": str(wait_s)})
    if isinstance(error, EngineClosedError):
        return ApiError(text, status=503, code="shutting_down")
    if isinstance(error, (OptionError, TemplateError)):
        named = _FIRST_NAME.match(text)
        return ApiError(text, param=named[1] + named[2] if named else None, code="invalid_value")
    if isinstance(error, LfmError):
        return ApiError(text, status=500)
    return ApiError("the server failed on this request; its log has the details", status=500, code="internal_error")


def dialect_of(path: str) -> Dialect:
    """Whose interface a path belongs to."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def closing_error() -> ApiError:
    """What is answered while the server closes."""
    return ApiError(
        "the server is shutting down; try again when it is back", status=503, code="shutting_down", closes=True
    )
