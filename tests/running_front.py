"""A front of servers, in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from running_server import PATIENCE_S, Running, wait_until

from lfm_mlx.replicas import Fleet, Front, FrontSettings, Replica, make_front_app, serve_front
from lfm_mlx.server import HttpServer, bind


@dataclass(frozen=True)
class Fronted:
    """A front, and a client for it."""

    front: Front
    http: httpx.Client

    def chat(self, content: str = "Say hello.", **fields: Any) -> httpx.Response:
        """One question."""
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **fields})

    def replica(self, served: Running) -> Replica:
        """What the front knows of a server."""
        return next(one for one in self.front.fleet.replicas if one.url == served.url)


@contextlib.contextmanager
def fronting(
    *urls: str, key: str | None = None, limits: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[Fronted]:
    """A front in a thread, which ends with the block.

    Args:
        *urls: of the servers behind it.
        key: theirs.
        limits: as `HttpServer` takes them.
        **settings: as `FrontSettings` takes them.

    Raises:
        LfmError: what the front raised before it served.
    """
    front = Front(Fleet([Replica(url, key=key) for url in urls]), FrontSettings(**settings))
    server = HttpServer(make_front_app(front), front, **{"shutdown_timeout_s": 1.0, **(limits or {})})
    listening = bind("127.0.0.1", 0)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            serve_front(front, server, listening, lambda: None)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or bool(errors))
    try:
        if errors:
            raise errors[0]
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=PATIENCE_S) as http:
            yield Fronted(front, http)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listening.close()
        assert not thread.is_alive()
