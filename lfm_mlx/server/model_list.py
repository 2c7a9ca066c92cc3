"""GET /v1/models and /v1/models/{name}: objects that clients of OpenAI and of Anthropic both read."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.server.endpoint import service_of
from lfm_mlx.server.model_service import Service


async def list_models(request: Request) -> Response:
    """The model, under its name and its aliases."""
    service = service_of(request)
    models = [_describe(service, name) for name in service.settings.names]
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"], "has_more": False}
    return JSONResponse({"object": "list", "data": models, **ends})


async def show_model(request: Request) -> Response:
    """One model."""
    service = service_of(request)
    name = request.path_params["name"]
    service.check_name(name)
    return JSONResponse(_describe(service, name))


def _describe(service: Service, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(service.created_s, timezone.utc)
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": service.created_s,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "display_name": name,
        "owned_by": "lfm_mlx",
        "root": service.name,
        "parent": None,
        "max_model_len": service.model.max_context,
        "fingerprint": service.settings.fingerprint,
    }
