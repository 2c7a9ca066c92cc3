"""HTTP/1.1 as uvicorn speaks it, with limits on clients that do not speak or do not listen."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 30.0
"""In which a request has to begin: its head has to be there, and the rest of one that was answered early."""

READ_TIMEOUT_S = 60.0
"""In which a client has to take something of what was written for it."""

SEND_BUFFER_BYTES = 128 << 10
"""Of the system's buffer for a connection; left to itself it takes megabytes for a client that does not read."""


class GuardedProtocol(H11Protocol):
    """Drops connections that ask for nothing, and those whose client does not read what it asked for."""

    header_timeout_s = HEADER_TIMEOUT_S
    read_timeout_s = READ_TIMEOUT_S
    send_buffer_bytes = SEND_BUFFER_BYTES
    _reading: asyncio.TimerHandle | None = None
    _asking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Bound what waits to be sent, and start the clock of the first request."""
        super().connection_made(transport)
        bare = transport.get_extra_info("socket")
        if bare is not None:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer_bytes)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Part of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """One was answered."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; where an answer has begun, the connection can only end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has not read for a while: it gets some time."""
        super().pause_writing()
        self._reading = self.loop.call_later(self.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        super().resume_writing()

    def _watch(self) -> None:
        """Have a clock run while there is nothing to answer; bytes that make no request do not set it back."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self._asking is not None:
            self._asking.cancel()
            self._asking = None
        elif not is_answering and self._asking is None and not self.transport.is_closing():
            self._asking = self.loop.call_later(self.header_timeout_s, self.transport.abort)


def protocol_class(*, read_timeout_s: float, header_timeout_s: float, send_buffer_bytes: int) -> type[GuardedProtocol]:
    """The protocol with these limits."""
    limits = {
        "read_timeout_s": read_timeout_s,
        "header_timeout_s": header_timeout_s,
        "send_buffer_bytes": send_buffer_bytes,
    }
    return type("GuardedProtocol", (GuardedProtocol,), limits)
