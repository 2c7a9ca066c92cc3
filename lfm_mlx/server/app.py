"""The application: which path leads to which endpoint."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lfm_mlx.errors import LfmError
from lfm_mlx.server.access import Access
from lfm_mlx.server.chat_completions import chat_completions
from lfm_mlx.server.endpoint import request_id
from lfm_mlx.server.health import health, live, ready, show_metrics
from lfm_mlx.server.http_errors import ApiError, as_api_error, dialect_of
from lfm_mlx.server.model_list import list_models, show_model
from lfm_mlx.server.model_service import Service

ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{name:path}", show_model, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/health/live", live, methods=["GET"]),
    Route("/health/ready", ready, methods=["GET"]),
    Route("/metrics", show_metrics, methods=["GET"]),
]


def make_app(service: Service) -> Starlette:
    """The application that serves a model; it closes the service when it ends."""
    settings = service.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    middleware = [Middleware(Access, settings=settings, metrics=service.metrics)]
    if settings.cors_origins:
        headers = ["authorization", "content-type", "x-api-key", "x-request-id", "anthropic-version", "anthropic-beta"]
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=headers,
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={LfmError: _answer_error, HTTPException: _answer_http_error},
    )
    app.state.service = service
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(dialect_of(request.url.path), request_id(request))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:200], request.method[:20]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        text, code = f"{path} was called with {method}, expected {allowed}", "method_not_allowed"
    else:
        text, code = f"there is no {path} here, expected {', '.join(route.path for route in ROUTES)}", "not_found"
    api_error = ApiError(text, status=error.status_code, code=code, headers=error.headers)
    return api_error.response(dialect_of(request.url.path), request_id(request))
