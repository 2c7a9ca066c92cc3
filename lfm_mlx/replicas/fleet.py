"""All servers of a model: which of them are ready, and which one a request goes to."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lfm_mlx.errors import OptionError
from lfm_mlx.replicas.prompt_trace import PromptTrace
from lfm_mlx.replicas.replica import Facts, NotReadyError, Replica, ReplicaLostError
from lfm_mlx.server.http_errors import ApiError

log = logging.getLogger("lfm_mlx.replicas")

CHECK_S = 1.0
"""Between two questions how a server is."""

SILENCE_S = 10.0
"""A server from which nothing came for so long is given up, with all that it was to answer."""

CHARS_PER_REQUEST = 2000
"""So much of a prompt to compute weighs as much as one request that is being answered."""

MOST_AHEAD = 4.0
"""However long a prompt, a server that has it is preferred only up to so many requests more than another one has."""

MAX_RESPONSES = 1 << 16
"""Of stored responses, whose server is remembered; of older ones, all servers are asked."""


class Fleet:
    """Servers of the same model.

    Args:
        replicas: the servers.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self._model: tuple[str, Mapping[str, Any]] | None = None
        self._turn = 0
        self._holders: OrderedDict[str, Replica] = OrderedDict()
        self._watches: list[asyncio.Task[None]] = []

    @property
    def num_ready(self) -> int:
        """Servers that requests may go to."""
        return sum(replica.is_ready for replica in self.replicas)

    async def start(self) -> None:
        """Ask all servers how they are, and go on asking. One that is not there yet may come later.

        Raises:
            OptionError: one that is there has another model than another one, or refuses the key.
        """
        found = await asyncio.gather(*(_look(replica) for replica in self.replicas))
        for replica, facts in zip(self.replicas, found, strict=True):
            problem = self._judge(replica, facts)
            if problem is not None and (isinstance(facts, Facts) or facts.is_lasting):
                raise OptionError(f"the replica {replica.name} cannot be used: {problem}")
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def close(self) -> None:
        """Ask no more, and close all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self.replicas:
            await replica.close()

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._judge(replica, await _look(replica))
            if not replica.is_ready and replica.silent_s > SILENCE_S:
                what = f"nothing came from it for {SILENCE_S:g} s"
                replica.drop(ReplicaLostError(replica.name, what, has_begun=True))

    def _judge(self, replica: Replica, found: Facts | NotReadyError) -> str | None:
        """Decide whether a server is to be used; returns what is against it."""
        problem = str(found) if isinstance(found, NotReadyError) else self._difference(found)
        if isinstance(found, NotReadyError) or problem is not None:
            self.set_aside(replica, problem)
            return problem
        if self._model is None:
            self._model = (replica.name, found.model)
        if replica.facts is not None and replica.facts.created_s != found.created_s:
            replica.prefixes.clear()
        replica.facts = found
        replica.problem = None
        if not replica.is_ready:
            replica.is_ready = True
            log.info("replica ready", extra={"fields": {"replica": replica.name, "ready": self.num_ready}})
        return None

    def _difference(self, found: Facts) -> str | None:
        """What a server has unlike the others."""
        if self._model is None:
            return None
        name, expected = self._model
        for key, value in expected.items():
            if found.model.get(key) != value:
                return (
                    f"its {key} is {found.model.get(key)!r}, expected {value!r} as {name} has; serve the same model "
                    "everywhere, with the same options"
                )
        return None

    def set_aside(self, replica: Replica, problem: str | None) -> None:
        """Send a server nothing more until it is found ready again."""
        if replica.is_ready or replica.problem != problem:
            log.warning("replica set aside", extra={"fields": {"replica": replica.name, "problem": problem}})
        replica.is_ready = False
        replica.problem = problem
        if not self.num_ready:
            self._model = None  # Whoever comes first says what is served from then on.

    def choose(self, trace: PromptTrace, tried: Collection[Replica] = ()) -> Replica | None:
        """The server for a request, which is noted as sent there; None where none is left.

        It is the one that holds the response that is meant; or else the one that has the least to do: requests that
        are being answered there, and what of the prompt it has not computed before.

        Args:
            trace: of the prompt.
            tried: servers that did not answer it.
        """
        usable = [replica for replica in self.replicas if replica.is_ready and replica not in tried]
        if not usable:
            return None
        holder = self._holders.get(trace.response) if trace.response is not None else None
        if holder is None or holder not in usable:
            holder = min(usable, key=lambda replica: (_cost(replica, trace), replica.turn))
        self._turn += 1
        holder.turn = self._turn
        holder.prefixes.add(trace)
        return holder

    def remember(self, response: str, replica: Replica) -> None:
        """Note which server holds a stored response."""
        self._holders[response] = replica
        self._holders.move_to_end(response)
        while len(self._holders) > MAX_RESPONSES:
            self._holders.popitem(last=False)

    def drop_all(self, error: ApiError) -> None:
        """End all that waits for an answer, with an error."""
        for replica in self.replicas:
            replica.drop(error)


def _cost(replica: Replica, trace: PromptTrace) -> float:
    """What a request would have to wait for at a server, in requests."""
    missing = trace.num_chars - replica.prefixes.match(trace)
    return replica.num_open + min(missing / CHARS_PER_REQUEST, MOST_AHEAD)


async def _look(replica: Replica) -> Facts | NotReadyError:
    try:
        return await replica.look()
    except NotReadyError as error:
        return error
