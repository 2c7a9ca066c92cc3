"""Servers with the embedded checkpoint, in threads of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lfm_mlx.cache import content_fingerprint
from lfm_mlx.load import load
from lfm_mlx.server import HttpServer, ServerSettings, Service, bind, make_app
from lfm_mlx.server.__main__ import make_prefix_cache

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"
PATIENCE_S = 60.0

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_TOOL = {"type": "function", "function": WEATHER}


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread, and a client for it."""

    service: Service
    server: HttpServer
    http: httpx.Client
    port: int

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def chat(self, content: str = "Say hello.", **fields: Any) -> httpx.Response:
        """One question."""
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **fields})

    def is_idle(self) -> bool:
        """Whether no answer runs or waits."""
        return self.service.num_open == 0

    def check_alive(self) -> None:
        """It answers as if nothing had happened, and nothing is left of what had."""
        wait_until(self.is_idle)
        response = self.chat("What is the capital of France?", max_tokens=4)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["reasoning"] == "The user"
        assert self.http.get("/health/ready").status_code == 200


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that has to come about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@contextlib.contextmanager
def running(service: Service, *, port: int = 0, **options: Any) -> Iterator[Running]:
    """A server in a thread, which ends with the block."""
    server = HttpServer(make_app(service), service, **{"shutdown_timeout_s": 1.0, **options})
    listening = bind("127.0.0.1", port)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            yield Running(service, server, http, port)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def new_service(cache_folder: Path | None = None, **settings: Any) -> Service:
    """A service of its own, with a prefix cache, in a folder too where one is named."""
    model, tokenizer = load(TINY)
    cache = make_prefix_cache(model, TINY, 0.05, cache_folder, 0.05)
    settings = {"names": ("tiny", "alias"), "fingerprint": content_fingerprint(TINY), **settings}
    return Service(model, tokenizer, ServerSettings(**settings), prefix_cache=cache)
