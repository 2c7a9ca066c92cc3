"""GET /health, /health/live, /health/ready and /metrics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.server.endpoint import service_of


async def live(request: Request) -> Response:
    """Whether the process answers at all."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """Whether it takes questions: 200, or 503 while it shuts down."""
    is_closing = service_of(request).is_closing
    return JSONResponse({"status": "closing" if is_closing else "ready"}, 503 if is_closing else 200)


async def health(request: Request) -> Response:
    """As `ready`, with numbers."""
    service = service_of(request)
    numbers = {name: value for name, (_, value) in service.gauges().items()}
    status = "closing" if service.is_closing else "ready"
    return JSONResponse({"status": status, "created": service.created_s, **numbers}, 503 if service.is_closing else 200)


async def show_metrics(request: Request) -> Response:
    """The counters, in Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
