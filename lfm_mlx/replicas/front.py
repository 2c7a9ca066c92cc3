"""The front of several servers: one address that answers as each of them does."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.errors import RankError
from lfm_mlx.replicas.exchange import Exchange, response_id
from lfm_mlx.replicas.fleet import Fleet
from lfm_mlx.replicas.front_metrics import FrontMetrics, join_metrics
from lfm_mlx.replicas.prompt_trace import PromptTrace, trace_of
from lfm_mlx.replicas.relay import Relay
from lfm_mlx.replicas.replica import CHECK_TIMEOUT_S, Replica, ReplicaLostError
from lfm_mlx.server.app import ENDPOINTS, build_app
from lfm_mlx.server.chat_page import show_page, show_static
from lfm_mlx.server.endpoint import request_id
from lfm_mlx.server.health import live
from lfm_mlx.server.http_errors import RETRY_AFTER_S, ApiError, closing_error
from lfm_mlx.server.model_service import BODIES_AT_ONCE
from lfm_mlx.server.openapi import openapi_endpoint
from lfm_mlx.server.request_body import PARSE_IN_THREAD_BYTES, BodyRoom, parse_json, read_body
from lfm_mlx.server.sse import while_connected

log = logging.getLogger("lfm_mlx.replicas")

PROMPT_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Where a prompt is computed, so that it matters who has computed it before."""

MOST_LOST = 2
"""A request that this many servers took and went away over is not given to a further one."""

FAREWELL_S = 2.0
"""When a rank is gone, clients are told so for this long before the process ends."""


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """Limits and rules of a front; the servers behind it have their own.

    Args:
        api_keys: one of them has to come with every request; none lets everybody in.
        cors_origins: pages of which sites may call; "*" is all.
        max_body_bytes: of a request.
        body_timeout_s: seconds in which a body has to arrive.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16_000_000
    body_timeout_s: float = 60.0


class Front:
    """Sends every request to the server that suits it best, and to another one where that is gone.

    Args:
        fleet: the servers.
        settings: limits and rules.
    """

    def __init__(self, fleet: Fleet, settings: FrontSettings) -> None:
        self.fleet = fleet
        self.settings = settings
        self.metrics = FrontMetrics(fleet)
        self.bodies = BodyRoom(BODIES_AT_ONCE * settings.max_body_bytes)
        self._is_closing = False
        self._loss: RankError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Look for the servers and keep watching them.

        Raises:
            OptionError: one of them cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        await self.fleet.start()

    @property
    def is_lost(self) -> bool:
        """Whether another rank is gone, and this process ends in a moment."""
        return self._loss is not None

    @property
    def is_closing(self) -> bool:
        """Whether no more requests are taken."""
        return self._is_closing or self.is_lost

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return sum(replica.num_open for replica in self.fleet.replicas)

    def begin_closing(self) -> None:
        """Take no more requests."""
        self._is_closing = True

    def cancel_all(self) -> None:
        """End all answers, because the server closes."""
        self.fleet.drop_all(closing_error())

    def lose(self, loss: RankError) -> float:
        """A rank is gone, and this process ends with it; called from another thread.

        Returns:
            Seconds in which those who wait may read that.
        """
        self._loss = loss
        if self._loop is None or self._loop.is_closed():
            return 0.0
        self._loop.call_soon_threadsafe(self.fleet.drop_all, self._lost_error())
        return FAREWELL_S

    def _lost_error(self) -> ApiError:
        return ApiError(str(self._loss), status=503, code="shutting_down", closes=True)

    async def forward(self, request: Request) -> Response:
        """The answer of the server that suits a request best.

        Raises:
            ApiError: its body is refused, or no server is there.
        """
        if self.is_closing:
            raise self._lost_error() if self.is_lost else closing_error()
        body = b""
        if request.method == "POST":
            limit, timeout_s = self.settings.max_body_bytes, self.settings.body_timeout_s
            body = await read_body(request, max_bytes=limit, timeout_s=timeout_s, room=self.bodies)
        try:
            trace = await _trace(request, body)
            return await self._forward(request, body, trace)
        finally:
            self.bodies.give(len(body))

    async def _forward(self, request: Request, body: bytes, trace: PromptTrace) -> Response:
        tried: list[Replica] = []
        refusal: Response | None = None
        num_lost = 0
        while num_lost < MOST_LOST and (replica := self._choose(trace, tried)) is not None:
            if tried:
                self.metrics.count_retry(tried[-1].name)
            tried.append(replica)
            request.scope["log_fields"] = {"replica": replica.name}
            exchange = Exchange(replica, request, _target(request), body, request_id(request))
            is_passed_on = False
            try:
                await while_connected(request, exchange.begin(), lambda: None)
                if not _is_for_another(exchange, trace):
                    is_passed_on = exchange.is_stream
                    return self._response(exchange)
                if refusal is None or exchange.status == 503:
                    refusal = self._response(exchange)
            except ReplicaLostError as error:
                num_lost += error.has_begun
                self._note_loss(replica, error)
            finally:
                if not is_passed_on:
                    await exchange.close()
        if refusal is not None:
            return refusal
        raise self._nobody(len(tried))

    def _choose(self, trace: PromptTrace, tried: list[Replica]) -> Replica | None:
        matched = {replica.name: replica.prefixes.match(trace) for replica in self.fleet.replicas}
        replica = self.fleet.choose(trace, tried)
        if replica is not None:
            self.metrics.count_request(replica, trace, matched[replica.name])
        return replica

    def _response(self, exchange: Exchange) -> Response:
        remember = functools.partial(self.fleet.remember, replica=exchange.replica)
        if exchange.is_stream:
            on_loss = functools.partial(self._lose_stream, exchange.replica)
            return Relay(exchange, on_response=remember, on_loss=on_loss)  # type: ignore[return-value]
        if (name := response_id(exchange.body)) is not None:
            remember(name)
        return Response(exchange.body, exchange.status, headers=exchange.headers)

    def _note_loss(self, replica: Replica, error: ReplicaLostError) -> None:
        if error.has_begun:  # That may be for this request alone; whether it is there at all is found out soon.
            log.warning("replica lost", extra={"fields": {"replica": replica.name, "problem": error.what}})
        else:
            self.fleet.set_aside(replica, error.what)

    def _lose_stream(self, replica: Replica, error: ReplicaLostError) -> None:
        self.metrics.count_lost(replica.name)
        self._note_loss(replica, error)

    def _nobody(self, num_tried: int) -> ApiError:
        num = len(self.fleet.replicas)
        found = (
            f"{num_tried} of the {num} servers behind this one went away"
            if num_tried
            else (f"none of the {num} servers behind this one is ready")
        )
        return ApiError(
            f"{found}, expected one that answers; try again later, this server's log tells what became of them",
            status=503,
            code="no_replica",
            headers={"retry-after": str(RETRY_AFTER_S)},
        )


async def _trace(request: Request, body: bytes) -> PromptTrace:
    """What a request's prompt begins with, or which response it means; the empty trace where that plays no part."""
    if request.url.path in PROMPT_PATHS:
        if len(body) >= PARSE_IN_THREAD_BYTES:
            return await asyncio.to_thread(lambda: trace_of(parse_json(body)))
        return trace_of(parse_json(body))
    if request.url.path.startswith("/v1/responses/"):
        return PromptTrace(response=request.path_params["name"])
    return PromptTrace()


def _target(request: Request) -> str:
    """Path and query for another server."""
    path = request.scope["route"].path
    if "name" in request.path_params:
        path = path.partition("{")[0] + quote(request.path_params["name"], safe="")
    return f"{path}?{request.url.query}" if request.url.query else str(path)


def _is_for_another(exchange: Exchange, trace: PromptTrace) -> bool:
    """Whether another server may have a better answer: there is no room in this one, or it lacks a stored response."""
    if exchange.status == 404 and trace.response is not None:
        with_code = _json(exchange.body).get("error")
        return isinstance(with_code, dict) and with_code.get("code") == "response_not_found"
    return exchange.status == 503


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def make_front_app(front: Front) -> Starlette:
    """The application of a front: all that a server answers, most of it by the servers behind."""
    own = {
        "/": show_page,
        "/static/{name}": show_static,
        "/health": health,
        "/health/live": live,
        "/health/ready": health,
        "/metrics": show_metrics,
    }
    endpoints = [dataclasses.replace(one, handler=own.get(one.path, forward)) for one in ENDPOINTS]
    app = build_app(
        [*endpoints, openapi_endpoint(ENDPOINTS)],
        api_keys=front.settings.api_keys,
        cors_origins=front.settings.cors_origins,
        count_http=front.metrics.count_http,
    )
    app.state.front = front
    return app


def _front_of(request: Request) -> Front:
    return cast(Front, request.app.state.front)


async def forward(request: Request) -> Response:
    """Let a server answer."""
    return await _front_of(request).forward(request)


async def health(request: Request) -> Response:
    """Whether questions are taken, and how many servers answer them: 200, or 503 with none."""
    front = _front_of(request)
    num_ready = front.fleet.num_ready
    status = "closing" if front.is_closing else "ready" if num_ready else "no replica"
    numbers = {"replicas": len(front.fleet.replicas), "replicas_ready": num_ready, "num_requests_open": front.num_open}
    return JSONResponse({"status": status, **numbers}, 200 if status == "ready" else 503)


async def show_metrics(request: Request) -> Response:
    """The counters of the front, and of all servers that are ready with the label `replica`."""
    front = _front_of(request)
    ready = [replica for replica in front.fleet.replicas if replica.is_ready]
    texts = await asyncio.gather(*(_metrics_of(replica) for replica in ready))
    others = {replica.name: text for replica, text in zip(ready, texts, strict=True) if text is not None}
    text = join_metrics(front.metrics.text().decode(), others)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _metrics_of(replica: Replica) -> str | None:
    try:
        response = await replica.client.get(f"{replica.url}/metrics", timeout=CHECK_TIMEOUT_S)
    except httpx.HTTPError:
        return None
    return response.text if response.status_code == 200 else None
