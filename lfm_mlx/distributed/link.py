"""Connections between rank 0 and the others, beside those of `mlx.distributed`: notes of what to do, and signs of life.

A collective waits for ever for a rank that is gone. So every rank sends a sign of life twice a second; one whose
connection closes, or that is silent too long, ends all of them, and rank 0 says which it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lfm_mlx.distributed.arrival import arrivals, connect
from lfm_mlx.distributed.watch import Watch
from lfm_mlx.distributed.world import World, launcher
from lfm_mlx.errors import LfmError, RankError
from lfm_mlx.memory import available_bytes

BEAT_S = 0.5
STALL_S = 7.0
"""A rank that sends nothing for so long has stalled."""

ARRIVAL_S = 60.0
"""In which all ranks have to have started."""

BLAME_S = 0.5
"""A rank whose own work fails, or that is told to end, waits so long: mostly it failed because another rank is gone."""

LEAVE_S = 2.0
"""In which a rank leaves by itself after the end."""

OTHERS_S = 0.2
"""What MLX's own thread says about a lost connection comes in pieces; a line of ours waits until it has been said."""

_TOLD = "rank 0 is gone: it failed"
"""How the failure begins of which rank 0 has told its user already."""

Note = dict[str, Any]
"""What is sent: anything that JSON can say."""


class Peer:
    """One connection; a thread reads it and puts notes into `notes`.

    Args:
        connection: to the other rank.
        on_loss: called with what happened when the other side is gone or silent.
        on_ready: called with the number of what the other side has ready.

    Attributes:
        notes: what came and was not looked at.
        is_ended: whether the note came that ends the run in good order.
        free_bytes: of memory, as the other side told last; None before.
    """

    def __init__(
        self, connection: socket.socket, on_loss: Callable[[str], None], on_ready: Callable[[int], None]
    ) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(STALL_S)
        self.notes: queue.SimpleQueue[Note] = queue.SimpleQueue()
        self.is_ended = False
        self.free_bytes: int | None = None
        self._connection = connection
        self._on_loss = on_loss
        self._on_ready = on_ready
        self._sending = threading.Lock()

    @property
    def handle(self) -> int:
        """The system's number of the connection."""
        return self._connection.fileno()

    @property
    def own_host(self) -> str:
        """This machine's address on the way there."""
        return str(self._connection.getsockname()[0])

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="lfm-link", daemon=True).start()

    def send(self, note: Note | None = None) -> None:
        """Send a note, or a sign of life."""
        text = "" if note is None else json.dumps(note, separators=(",", ":"))
        try:
            with self._sending:
                self._connection.sendall(text.encode() + b"\n")
        except OSError as error:
            self._on_loss(_told(error))

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = self._connection.recv(1 << 16)
            except OSError as error:
                self._on_loss(_told(error))
                return
            if not data:
                self._on_loss("its connection was closed")
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in filter(None, lines):
                note = json.loads(line)
                if "failed" in note:
                    self._on_loss(f"it failed with {note['failed']}")
                    return
                self.is_ended = self.is_ended or "end" in note
                if "free_bytes" in note:
                    self.free_bytes = note["free_bytes"]
                elif "ready" in note:
                    self._on_ready(note["ready"])
                else:
                    self.notes.put(note)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _told(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"it was silent for {STALL_S:g} s"
    is_closed = isinstance(error, (ConnectionResetError, BrokenPipeError))
    return "its connection was closed" if is_closed else f"its connection broke ({error})"


class Link:
    """This rank's connections: rank 0 has one to every other rank, which have one to it.

    Args:
        world: the processes.
        watch: ends this process from outside where it cannot do so itself; None: nothing does.
        arrival_s: in which all of them have to come.

    Attributes:
        failure: what ended the run; None while it goes on.
        on_failure: called when the run ends because a rank is gone, before this process does; what it returns is how
            many seconds the process shall live on.
        on_close: called at the end in good order: waits for collectives that were begun, for others to end them too.

    Raises:
        RankError: not all came.
        OptionError: rank 0's address cannot be listened on.
    """

    def __init__(self, world: World, *, watch: Watch | None = None, arrival_s: float = ARRIVAL_S) -> None:
        self.world = world
        self.failure: RankError | None = None
        self.on_failure: Callable[[RankError], float] | None = None
        self.on_close: Callable[[], None] | None = None
        self._watch = watch
        self._launcher = launcher()
        self._is_closing = False
        self._failing = threading.Lock()
        self._noting = threading.Lock()
        self.peers: dict[int, Peer] = {}
        self._awaited: dict[int, tuple[set[int], Callable[[], None]]] = {}
        threading.Thread(target=self._beat, name="lfm-beat", daemon=True).start()
        if world.rank > 0:
            self._add(0, connect(world, arrival_s))
            return
        try:
            for rank, connection in arrivals(world, arrival_s, self.peers):
                self._add(rank, connection)  # Signs of life go out at once: others may take their time.
        except RankError as error:
            self._is_closing = True
            self.send({"failed": str(error)})
            raise

    def _add(self, rank: int, connection: socket.socket) -> None:
        peer = Peer(connection, self._loss_of(rank), lambda number: self._note_ready(rank, number))
        self.peers[rank] = peer
        peer.start()

    @property
    def handles(self) -> set[int]:
        """The system's numbers of these connections."""
        return {peer.handle for peer in self.peers.values()}

    @property
    def free_bytes(self) -> int:
        """Rank 0: bytes that may still be allocated on every rank."""
        told = [peer.free_bytes for peer in self.peers.values() if peer.free_bytes is not None]
        return min([available_bytes(), *told])

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0."""
        return self.world.rank == 0

    def send(self, note: Note) -> None:
        """Rank 0: send a note to every other rank."""
        for peer in list(self.peers.values()):
            peer.send(note)

    def receive(self) -> Note:
        """Other ranks: rank 0's next note; waits for it."""
        return self.peers[0].notes.get()

    def expect(self, name: str) -> Any:
        """Other ranks: what rank 0's next note says under `name`; where that is another note, the run ends."""
        return self._said(self.receive(), name)

    def tell(self, note: Note) -> None:
        """Other ranks: send a note to rank 0."""
        self.peers[0].send(note)

    def hear(self, name: str) -> list[Any]:
        """Rank 0: what the next note of every other rank says under `name`, in their order; waits for all."""
        return [self._said(self.peers[rank].notes.get(), name) for rank in sorted(self.peers)]

    def _said(self, note: Note, name: str) -> Any:
        if name not in note:
            self.fail(RuntimeError(f"the ranks are out of step: {sorted(note)} came, expected {name}"))
        return note[name]

    def call_when_ready(self, number: int, on_ready: Callable[[], None]) -> None:
        """Rank 0: call back, from another thread, when all others have told that they have `number` ready."""
        self._awaited[number] = set(self.peers), on_ready

    def tell_ready(self, number: int) -> None:
        """Other ranks: tell rank 0, from any thread, that what has this number is ready; once or more often."""
        self.peers[0].send({"ready": number})

    def _note_ready(self, rank: int, number: int) -> None:
        with self._noting:
            if number not in self._awaited:  # Told twice: of the last two pieces, each may find that all have come.
                return
            missing, on_ready = self._awaited[number]
            missing.discard(rank)
            if missing:
                return
            del self._awaited[number]
        on_ready()

    def wait_for_end(self) -> None:
        """Other ranks: wait until rank 0 ends the run in good order."""
        while not self.peers[0].is_ended:
            self.receive()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Compare what all ranks have to have alike; all of them call it, and go on together.

        Raises:
            RankError: one has something else; the message names it.
        """
        mine = json.loads(json.dumps(facts))
        if not self.is_leader:
            self.tell({"facts": mine})
            answer = self.receive()
            if "agreed" not in answer:
                sys.exit(1)  # Rank 0 tells why.
            return
        found = zip(sorted(self.peers), self.hear("facts"), strict=True)
        problem = next(filter(None, (_difference(rank, theirs, mine) for rank, theirs in found)), None)
        self.send({"refused": problem} if problem is not None else {"agreed": True})
        if problem is not None:
            raise RankError(problem)

    def close(self) -> None:
        """Take no loss for a failure any more; on rank 0 also let the others end."""
        self._is_closing = True
        if self._watch is not None:
            self._watch.sign(is_last=True)
        if self.is_leader:
            self.send({"end": True})
        if self.on_close is not None:
            self.on_close()

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails in here on a rank other than 0 is told to the user by rank 0, and ends all ranks."""
        try:
            yield
        except LfmError as error:
            if not self.is_leader:
                self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """End the run because this rank's own work failed; does not return."""
        time.sleep(BLAME_S)
        if self.is_leader:
            self._end(RankError(f"rank 0 failed with {_named(error)}; all ranks end, start them again"))
        else:
            self.peers[0].send({"failed": _named(error)})
        while True:  # The thread that ends this process is another one.
            time.sleep(STALL_S)

    def _loss_of(self, rank: int) -> Callable[[str], None]:
        return lambda what: self._end(RankError(f"rank {rank} is gone: {what}; all ranks end, start them again"))

    def _end(self, failure: RankError) -> None:
        """Say why, and end this process; a collective that waits could not be ended in any other way."""
        with self._failing:
            if self._is_closing:
                return
            self.failure = failure
            self._is_closing = True
            if self._watch is not None:
                self._watch.sign(is_last=True)
        if not self.is_leader and self.peers[0].is_ended:
            time.sleep(LEAVE_S)  # Still here, this process waits in a collective for ranks that are gone.
            os._exit(0)
        # First: a launcher may end this process, unless it knows that it is to live on.
        left_s = self.on_failure(failure) if self.on_failure is not None else 0.0
        if self.is_leader:
            _write_error(str(failure))
            self.send({"failed": str(failure)})
        elif not str(failure).startswith(_TOLD):
            _write_error(f"rank {self.world.rank}: {failure}")
        time.sleep(left_s)
        os._exit(1)

    def _beat(self) -> None:
        while not self._is_closing:
            if self._watch is not None:
                self._watch.sign()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end(RankError("mlx.launch is gone; all ranks end, start them again"))
            for peer in list(self.peers.values()):  # More may come meanwhile.
                peer.send(None if self.is_leader else {"free_bytes": available_bytes()})
            time.sleep(BEAT_S)


def _write_error(text: str) -> None:
    time.sleep(OTHERS_S)
    with contextlib.suppress(OSError):  # Nobody may be there to read it.
        os.write(2, f"error: {text}\n".encode())


def _difference(rank: int, theirs: Note, mine: Note) -> str | None:
    for name in mine:
        if theirs.get(name) != mine[name]:
            return (
                f"rank {rank} has {name} {theirs.get(name)!r}, expected {mine[name]!r} as rank 0 has; "
                "give every rank the same"
            )
    return None
