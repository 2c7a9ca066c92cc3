"""HTTP/1.1 as uvicorn speaks it, with limits on clients that do not speak or do not listen."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 30.0
"""In which the head of a connection's first request has to arrive."""

READ_TIMEOUT_S = 60.0
"""In which a client has to take something of what was written for it."""


class GuardedProtocol(H11Protocol):
    """Drops connections that stay silent, and those whose client does not read what it asked for."""

    header_timeout_s = HEADER_TIMEOUT_S
    read_timeout_s = READ_TIMEOUT_S
    _reading: asyncio.TimerHandle | None = None
    _heading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time in which a request has to come."""
        super().connection_made(transport)
        self._heading = self.loop.call_later(self.header_timeout_s, self._drop_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for timer in (self._heading, self._reading):
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

    def _drop_silent(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def protocol_class(*, read_timeout_s: float, header_timeout_s: float = HEADER_TIMEOUT_S) -> type[GuardedProtocol]:
    """The protocol with these limits, in seconds."""
    limits = {"read_timeout_s": read_timeout_s, "header_timeout_s": header_timeout_s}
    return type("GuardedProtocol", (GuardedProtocol,), limits)
