"""One request at one server, from its first byte to the last of its answer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from starlette.requests import Request

from lfm_mlx.replicas.replica import Replica

_OF_ONE_CONNECTION = frozenset(
    {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding", "x-request-id", "request-id"}
)
"""Headers of an answer that are made anew."""

_RESPONSE_ID = re.compile(rb'"id": ?"(resp_\w+)"')
_HEAD_BYTES = 1000


class Exchange:
    """A request that is sent to a server; `close` it in the end, whatever happens.

    Args:
        replica: the server.
        request: as the client sent it.
        target: path and query.
        body: its body.
        request_id: under which both sides log it.
    """

    def __init__(self, replica: Replica, request: Request, target: str, body: bytes, request_id: str) -> None:
        self.replica = replica
        self.body = b""
        headers = {"x-request-id": request_id}
        if "content-type" in request.headers:
            headers["content-type"] = request.headers["content-type"]
        self._request = replica.client.build_request(
            request.method, replica.url + target, content=body or None, headers=headers
        )
        self._response: httpx.Response | None = None
        self._is_open = True
        replica.num_open += 1

    async def begin(self) -> None:
        """Send it and wait until the answer begins; one that is no stream of events is read to its end.

        Raises:
            ReplicaLostError: the server could not be reached, or broke off.
        """
        await self.replica.wait(self._begin())

    async def _begin(self) -> None:
        self._response = await self.replica.client.send(self._request, stream=True)
        if not self.is_stream:
            self.body = await self._response.aread()

    @property
    def response(self) -> httpx.Response:
        """The answer's head."""
        assert self._response is not None
        return self._response

    @property
    def status(self) -> int:
        """The answer's status."""
        return self.response.status_code

    @property
    def is_stream(self) -> bool:
        """Whether the answer is a stream of events."""
        return str(self.response.headers.get("content-type", "")).startswith("text/event-stream")

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers, as far as they are for the client."""
        return {name: value for name, value in self.response.headers.items() if name not in _OF_ONE_CONNECTION}

    async def parts(self) -> AsyncIterator[bytes]:
        """The bytes of a stream as they come; no faster than they are asked for.

        Raises:
            ReplicaLostError: the server broke off.
        """
        parts = self.response.aiter_raw()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield await self.replica.wait(_next(parts))

    async def close(self) -> None:
        """End it; a server that still writes notices at once."""
        if self._is_open:
            self._is_open = False
            self.replica.num_open -= 1
            if self._response is not None:
                await self._response.aclose()


async def _next(parts: AsyncIterator[bytes]) -> bytes:
    return await parts.__anext__()


class WholeEvents:
    """Cuts a stream where events end: half an event of a server that is gone would make the next one unreadable.

    Attributes:
        first: the first event with data.
        num_events: events with a name so far.
    """

    def __init__(self) -> None:
        self.first = b""
        self.num_events = 0
        self._rest = b""

    def feed(self, part: bytes) -> bytes:
        """What is whole of all that came and was not returned before."""
        whole, border, self._rest = (self._rest + part).rpartition(b"\n\n")
        whole += border
        for one in whole.split(b"\n\n"):
            if one.startswith(b"event:"):
                self.num_events += 1
            if not self.first and one.startswith((b"event:", b"data:")):
                self.first = one
        return whole

    @property
    def first_data(self) -> Mapping[str, Any]:
        """The data of the first event; empty where it is no object."""
        line = next((line for line in self.first.split(b"\n") if line.startswith(b"data:")), b"data:")
        with contextlib.suppress(ValueError):
            value = json.loads(line.removeprefix(b"data:"))
            return value if isinstance(value, dict) else {}
        return {}


def response_id(head: bytes) -> str | None:
    """The id in the beginning of an answer of the Responses interface; None where there is none."""
    found = _RESPONSE_ID.search(head, 0, _HEAD_BYTES)
    return found[1].decode() if found is not None else None
