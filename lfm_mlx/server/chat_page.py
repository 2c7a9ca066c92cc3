"""GET / and /static/{name}: a page to chat on, all of it from this server."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from lfm_mlx.server.http_errors import ApiError

PAGE = "chat_page.html"
STATIC_PREFIX = "/static/"

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""What the page may do: load its own files and talk to this server, and nothing from or to anywhere else."""

_FILES = {
    file.name: file.read_bytes()
    for file in (resources.files("lfm_mlx.server") / "static").iterdir()
    if file.name.rpartition(".")[2] in _MEDIA_TYPES
}


async def show_page(request: Request) -> Response:
    """A page to chat on."""
    return _answer(PAGE)


async def show_static(request: Request) -> Response:
    """A file of the page.

    Raises:
        ApiError: 404, there is no such file.
    """
    name = request.path_params["name"]
    if name not in _FILES:
        raise ApiError(
            f"there is no {name[:100]} here, expected {', '.join(sorted(_FILES))}", status=404, code="not_found"
        )
    return _answer(name)


def _answer(name: str) -> Response:
    return Response(_FILES[name], media_type=_MEDIA_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
