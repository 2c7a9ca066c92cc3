"""How the processes of a run find each other: rank 0 listens, the others come and say who they are."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping

from lfm_mlx.distributed.world import World
from lfm_mlx.errors import OptionError, RankError

TELLING_S = 5.0
"""After which rank 0 says for whom it waits."""

GREETING_S = 8.0
"""In which whoever connects has to have said who it is."""

_GREETING = b"lfm_mlx rank "


def arrivals(world: World, arrival_s: float, found: Mapping[int, object]) -> Iterator[tuple[int, socket.socket]]:
    """Rank 0: a connection from every other rank. The port is free afterwards, for `mlx.distributed` to take.

    Args:
        world: the processes.
        arrival_s: in which they have to come.
        found: what has become of the connections that were yielded.
    """
    started_s, num_missing, is_told = time.monotonic(), world.size - 1, False
    with _listening(world) as listening, _telling_of_termination(world, found):
        while num_missing:
            waited_s = time.monotonic() - started_s
            listening.settimeout(max(min(arrival_s - waited_s, TELLING_S), 0.001))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                waited_s = time.monotonic() - started_s
                if waited_s >= arrival_s:
                    raise RankError(
                        f"{_missing(world, found)} did not come within {arrival_s:g} s, expected all of "
                        f"{world.size} at {world.host}:{world.port}; is the program there, and the address reachable?"
                    ) from None
                if not is_told:
                    _tell_of_waiting(f"{_missing(world, found)} at {world.host}:{world.port}", arrival_s - waited_s)
                    is_told = True
                continue
            rank = _read_rank(connection)
            if rank is None or rank in found or not 0 < rank < world.size:
                connection.close()  # Whoever it is, it is none of ours.
            else:
                num_missing -= 1
                yield rank, connection


def _tell_of_waiting(whom: str, left_s: float) -> None:
    os.write(2, f"waiting for {whom}, {left_s:.0f} s more\n".encode())


def _missing(world: World, found: Mapping[int, object]) -> str:
    return f"rank {', '.join(str(rank) for rank in range(1, world.size) if rank not in found)}"


@contextlib.contextmanager
def _telling_of_termination(world: World, found: Mapping[int, object]) -> Iterator[None]:
    """A launcher that sees a rank fail ends the others: what they waited for is worth a line."""

    def tell(number: int, frame: object) -> None:
        raise RankError(f"this process was told to end while {_missing(world, found)} had not come; did that one fail?")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listening(world: World) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(world.host, world.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(world.size)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise OptionError(
            f"rank 0 cannot listen on {world.host}:{world.port} ({error.strerror}); give an address of this machine as "
            "the first of the hostfile, or another --starting-port"
        ) from error
    return listening


def _read_rank(connection: socket.socket) -> int | None:
    connection.settimeout(GREETING_S)
    try:
        greeting = connection.recv(len(_GREETING) + 8)
    except OSError:
        return None
    number = greeting.removeprefix(_GREETING).strip()
    return int(number) if greeting.startswith(_GREETING) and number.isdigit() else None


def connect(world: World, arrival_s: float) -> socket.socket:
    """Other ranks: a connection to rank 0, which may not listen yet.

    Raises:
        RankError: it was not there within `arrival_s` seconds.
    """
    deadline_s = time.monotonic() + arrival_s
    while True:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((world.host, world.port), timeout=GREETING_S)
            connection.sendall(_GREETING + f"{world.rank:<7}\n".encode())
            return connection
        if time.monotonic() > deadline_s:
            raise RankError(
                f"rank 0 was not at {world.host}:{world.port} within {arrival_s:g} s; is it running, and reachable?"
            )
        time.sleep(0.05)
