"""From a front to a running server and back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from lfm_mlx.replicas.front import Front
from lfm_mlx.server import HttpServer


def serve_front(front: Front, server: HttpServer, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve a front until a signal ends it.

    Args:
        front: what is served.
        server: of its application.
        listening: where.
        on_ready: called when the servers behind it have been looked at, before the first request is taken.

    Raises:
        OptionError: a server behind it cannot be used.
    """
    asyncio.run(_serve(front, server, listening, on_ready))


async def _serve(front: Front, server: HttpServer, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    try:
        await front.start()
        on_ready()
        await server.serve(sockets=[listening])
    finally:
        await front.fleet.close()
