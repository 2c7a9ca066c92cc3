"""The application: which path leads to which endpoint."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from lfm_mlx.errors import LfmError
from lfm_mlx.server.access import Access
from lfm_mlx.server.anthropic_fields import COUNT, MESSAGES
from lfm_mlx.server.anthropic_messages import count_tokens, messages
from lfm_mlx.server.chat_completions import CHAT, chat_completions
from lfm_mlx.server.chat_page import show_page, show_static
from lfm_mlx.server.completions import COMPLETIONS, completions
from lfm_mlx.server.endpoint import request_id
from lfm_mlx.server.health import health, live, ready, show_metrics
from lfm_mlx.server.http_errors import ApiError, as_api_error, dialect_of
from lfm_mlx.server.model_list import list_models, show_model
from lfm_mlx.server.model_service import Service
from lfm_mlx.server.openapi import Endpoint, openapi_endpoint
from lfm_mlx.server.response_fields import RESPONSES
from lfm_mlx.server.responses import create_response, delete_response, show_response
from lfm_mlx.server.token_endpoints import DETOKENIZE, TOKENIZE, detokenize, tokenize

ENDPOINTS = [
    Endpoint(path="/v1/chat/completions", handler=chat_completions, method="POST", fields=CHAT, streams=True),
    Endpoint(path="/v1/completions", handler=completions, method="POST", fields=COMPLETIONS, streams=True),
    Endpoint(path="/v1/responses", handler=create_response, method="POST", fields=RESPONSES, streams=True),
    Endpoint(path="/v1/responses/{name}", handler=show_response),
    Endpoint(path="/v1/responses/{name}", handler=delete_response, method="DELETE"),
    Endpoint(path="/v1/messages", handler=messages, method="POST", fields=MESSAGES, streams=True),
    Endpoint(path="/v1/messages/count_tokens", handler=count_tokens, method="POST", fields=COUNT),
    Endpoint(path="/v1/models", handler=list_models),
    Endpoint(path="/v1/models/{name:path}", handler=show_model),
    Endpoint(path="/tokenize", handler=tokenize, method="POST", fields=TOKENIZE),
    Endpoint(path="/detokenize", handler=detokenize, method="POST", fields=DETOKENIZE),
    Endpoint(path="/health", handler=health),
    Endpoint(path="/health/live", handler=live),
    Endpoint(path="/health/ready", handler=ready),
    Endpoint(path="/metrics", handler=show_metrics, media_type="text/plain"),
    Endpoint(path="/", handler=show_page, media_type="text/html"),
    Endpoint(path="/static/{name}", handler=show_static, media_type="text/*"),
]
"""All that the server answers."""


def make_app(service: Service) -> Starlette:
    """The application that serves a model; it closes the service when it ends."""
    settings = service.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    app = build_app(
        [*ENDPOINTS, openapi_endpoint(ENDPOINTS)],
        api_keys=settings.api_keys,
        cors_origins=settings.cors_origins,
        count_http=service.metrics.count_http,
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def build_app(
    endpoints: Sequence[Endpoint],
    *,
    api_keys: Sequence[str],
    cors_origins: Sequence[str],
    count_http: Callable[[str, str, int], None],
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """An application of these endpoints, with what every request passes on its way to them.

    Args:
        endpoints: what is answered.
        api_keys, cors_origins, count_http: as `Access` takes them.
        lifespan: what runs around it.
    """
    middleware = [Middleware(Access, api_keys=api_keys, cors_origins=cors_origins, count_http=count_http)]
    if cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # Clients made for browsers send a dozen of their own.
                expose_headers=["x-request-id", "request-id", "retry-after"],
            )
        )
    return Starlette(
        routes=[Route(one.path, one.handler, methods=[one.method]) for one in endpoints],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={LfmError: _answer_error, HTTPException: _answer_http_error},
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(dialect_of(request.url.path), request_id(request))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:200], request.method[:20]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        text, code = f"{path} was called with {method}, expected {allowed}", "method_not_allowed"
    else:
        text, code = (
            f"there is no {path} here, expected {', '.join(dict.fromkeys(one.path for one in ENDPOINTS))}",
            "not_found",
        )
    api_error = ApiError(text, status=error.status_code, code=code, headers=error.headers)
    return api_error.response(dialect_of(request.url.path), request_id(request))
