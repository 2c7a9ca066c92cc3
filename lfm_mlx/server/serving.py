"""From a service to a running server and back: sockets, signals, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from lfm_mlx.errors import OptionError
from lfm_mlx.server.http_protocol import HEADER_TIMEOUT_S, READ_TIMEOUT_S, SEND_BUFFER_BYTES, protocol_class

log = logging.getLogger("lfm_mlx.server")
GRACE_S = 5.0
"""Given to streams to say that they were cut, beyond the time in which they may finish."""


class Served(Protocol):
    """What a server has to know of what it serves, to end well."""

    @property
    def is_lost(self) -> bool:
        """Whether another rank is gone, and this process ends in a moment."""

    @property
    def num_open(self) -> int:
        """Answers that run or wait."""

    def begin_closing(self) -> None:
        """Take no more questions."""

    def cancel_all(self) -> None:
        """End all answers, because the server closes."""


class HttpServer(uvicorn.Server):
    """uvicorn's server, which on SIGINT or SIGTERM lets answers finish for a while and then ends them.

    Args:
        app: answers the requests.
        service: what is behind it.
        shutdown_timeout_s: for answers to finish.
        read_timeout_s: in which a client has to read what was written.
        header_timeout_s: in which a client has to ask.
        send_buffer_bytes: of what the system holds for a client that does not read.
        tls_cert, tls_key: files in PEM form; None serves plain HTTP.
    """

    def __init__(
        self,
        app: Starlette,
        service: Served,
        *,
        shutdown_timeout_s: float = 10.0,
        read_timeout_s: float = READ_TIMEOUT_S,
        header_timeout_s: float = HEADER_TIMEOUT_S,
        send_buffer_bytes: int = SEND_BUFFER_BYTES,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._service = service
        self._shutdown_timeout_s = shutdown_timeout_s
        config = uvicorn.Config(
            app,
            http=protocol_class(
                read_timeout_s=read_timeout_s,
                header_timeout_s=header_timeout_s,
                send_buffer_bytes=send_buffer_bytes,
            ),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(shutdown_timeout_s + GRACE_S) or 1,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal: begin to shut down; but where a rank is gone, go on to say so for the seconds that are left."""
        if not self._service.is_lost:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, let answers finish within the time, end the others."""
        self._service.begin_closing()
        log.info("closing", extra={"fields": {"open_answers": self._service.num_open}})
        timer = asyncio.get_running_loop().call_later(self._shutdown_timeout_s, self._service.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()
        if self.force_exit:
            # Left out by uvicorn then; but a thread that is cut off within a step takes the process down with it.
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The first signal ends gracefully, another SIGINT at once; neither is raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_certificate(cert: Path, key: Path) -> None:
    """Refuse files of which no TLS can be made; a key with a pass phrase would ask for it in the terminal.

    Raises:
        OptionError: naming the files.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{cert} and {key} cannot be used for TLS ({error}); expected a certificate and its key in PEM form, "
            "the key without a pass phrase; name other --tls-cert and --tls-key"
        ) from error


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        OptionError: the address cannot be used.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol named, asyncio sends each piece at once (TCP_NODELAY); without it, some wait 40 ms.
        listening = socket.socket(info[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(info[4])
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise OptionError(
            f"{host}:{port} cannot be listened on: {error.strerror}; choose another --host or --port"
        ) from error
    return listening
