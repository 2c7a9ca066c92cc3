"""A stream of events, passed on from a server to a client as it comes."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from lfm_mlx.replicas.exchange import Exchange, WholeEvents, response_id
from lfm_mlx.replicas.replica import ReplicaLostError
from lfm_mlx.server.http_errors import ApiError, dialect_of
from lfm_mlx.server.sse import event, write_while_connected


class Relay:
    """A response that passes on an answer, byte for byte.

    It reads no faster than the client does. When the client goes away the server is told so; when the server goes
    away, the client is, by the interface's own event.

    Args:
        exchange: its answer has begun; closed in the end, whatever happens.
        on_response: called with the id of a stored response, where the answer is one.
        on_loss: called when the server went away.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        on_response: Callable[[str], None],
        on_loss: Callable[[ReplicaLostError], None],
    ) -> None:
        self._exchange = exchange
        self._on_response = on_response
        self._on_loss = on_loss

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await write_while_connected(self._write(scope, send), receive)
        finally:
            await self._exchange.close()

    async def _write(self, scope: Scope, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._exchange.headers.items()]
        await send({"type": "http.response.start", "status": self._exchange.status, "headers": headers})
        events = WholeEvents()
        try:
            async for part in self._exchange.parts():
                is_beginning = not events.first
                if whole := events.feed(part):
                    if is_beginning and (name := response_id(events.first)) is not None:
                        self._on_response(name)
                    await send({"type": "http.response.body", "body": whole, "more_body": True})
        except ApiError as error:
            if isinstance(error, ReplicaLostError):
                self._on_loss(error)
            failure = failure_event(error, scope["path"], events, scope["request_id"])
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def failure_event(error: ApiError, path: str, events: WholeEvents, request_id: str) -> bytes:
    """The last event of a stream that broke off, as the interface of a path has it.

    Args:
        error: what happened.
        path: of the request.
        events: what was passed on.
        request_id: under which it is logged.
    """
    begun = events.first_data.get("response")
    if path.startswith("/v1/responses") and isinstance(begun, dict):
        told = {"code": "server_error", "message": str(error)}
        failed = {**begun, "status": "failed", "error": told}
        kind = "response.failed"
        return event({"type": kind, "sequence_number": events.num_events, "response": failed}, kind)
    dialect = dialect_of(path)
    return event(error.body(dialect, request_id), "error" if dialect == "anthropic" else None)
