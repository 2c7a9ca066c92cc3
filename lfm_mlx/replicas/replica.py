"""One server among those that serve a model, as the front sees it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from lfm_mlx.errors import LfmError, OptionError
from lfm_mlx.replicas.prefix_index import PrefixIndex
from lfm_mlx.server.http_errors import ApiError

_T = TypeVar("_T")

CONNECT_S = 5.0
CHECK_TIMEOUT_S = 5.0
"""In which a server has to say how it is."""


class ReplicaLostError(ApiError):
    """A server could not be reached, or went away before it had answered.

    Args:
        replica: its name, for the log.
        what: what happened.
        has_begun: whether it may have begun to work on the request.
    """

    def __init__(self, replica: str, what: str, *, has_begun: bool) -> None:
        super().__init__(
            "the server that wrote this answer is gone; ask again, another one will answer",
            status=502,
            code="replica_lost",
        )
        self.replica = replica
        self.what = what
        self.has_begun = has_begun


class NotReadyError(LfmError):
    """A server that is not to be used now.

    Args:
        message: why.
        is_lasting: whether waiting does not help.
    """

    def __init__(self, message: str, *, is_lasting: bool = False) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a server says of itself.

    Args:
        created_s: when it was started, in seconds since 1970.
        model: what has to be alike on all: names, context and fingerprint.
    """

    created_s: int
    model: Mapping[str, Any]


class Replica:
    """A server, the connections to it, and what was sent there.

    Args:
        url: where it is, as http://host:port.
        key: its API key; None where it asks for none.

    Attributes:
        facts: what it said of itself when it was last found ready; None before.
        is_ready: whether requests go there.
        problem: why none do.
        num_open: requests that are being answered there.
        turn: number of the latest request that went there; for ties.
        prefixes: what its prefix cache is likely to hold.

    Raises:
        OptionError: the URL is none of a server.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            is_right = parts.scheme in ("http", "https") and parts.hostname and not parts.query and parts.port != 0
        except ValueError:
            is_right = False
        if not is_right:
            raise OptionError(f"the replica {url!r} is no URL of a server, expected one like http://mac1:8080")
        self.url = url.rstrip("/")
        self.name = parts.netloc.rpartition("@")[2] + parts.path.rstrip("/")
        self.facts: Facts | None = None
        self.is_ready = False
        self.problem: str | None = None
        self.num_open = 0
        self.turn = 0
        self.prefixes = PrefixIndex()
        self._heard_s = time.monotonic()
        self._waiting: set[asyncio.Future[Any]] = set()
        self._dropped: ApiError | None = None
        self.client = httpx.AsyncClient(
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key is not None else {}),
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # A proxy for the way out is none for servers next door.
            verify=ssl.create_default_context() if parts.scheme == "https" else False,
        )

    async def look(self) -> Facts:
        """What it says of itself now.

        Raises:
            NotReadyError: it does not answer, is shutting down, or refuses the key.
        """
        health = await self._get("/health")
        if health.status_code != 200:
            raise NotReadyError(f"it answers {health.status_code} to /health")
        created_s = _field(health, "created")
        if self.is_ready and self.facts is not None and self.facts.created_s == created_s:
            return self.facts
        models = await self._get("/v1/models")
        if models.status_code == 401:
            raise NotReadyError(
                "it refuses the key; give it with --replica-key-file or LFM_MLX_REPLICA_KEY", is_lasting=True
            )
        data = _field(models, "data")
        if models.status_code != 200 or not isinstance(created_s, int) or not isinstance(data, list) or not data:
            raise NotReadyError("it does not answer as a server of this version", is_lasting=True)
        return Facts(created_s=created_s, model=_model_facts(data))

    async def _get(self, path: str) -> httpx.Response:
        try:
            response = await self.client.get(self.url + path, timeout=CHECK_TIMEOUT_S)
        except httpx.TimeoutException:
            raise NotReadyError(f"it did not answer {path} within {CHECK_TIMEOUT_S:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.hear()  # Its machine lives, or will say itself that it does not.
            raise NotReadyError(_unreachable(str(error) or type(error).__name__)) from None
        self.hear()
        return response

    def hear(self) -> None:
        """Note that something came from there."""
        self._heard_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since anything came from there."""
        return time.monotonic() - self._heard_s

    async def wait(self, work: Awaitable[_T]) -> _T:
        """The result of work that this server does.

        Raises:
            ApiError: what `drop` was given meanwhile.
            ReplicaLostError: the connection could not be made, or broke.
        """
        working = asyncio.ensure_future(work)
        self._waiting.add(working)
        try:
            await asyncio.wait({working})
        finally:
            self._waiting.discard(working)
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
        if working.cancelled():
            assert self._dropped is not None
            raise self._dropped
        try:
            result = working.result()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._lost(error, has_begun=False) from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise self._lost(error, has_begun=True) from error
        self.hear()
        return result

    def _lost(self, error: Exception, *, has_begun: bool) -> ReplicaLostError:
        what = str(error) or type(error).__name__
        return ReplicaLostError(
            self.name, f"it broke off ({what})" if has_begun else _unreachable(what), has_begun=has_begun
        )

    def drop(self, error: ApiError) -> None:
        """End all that waits for this server, with an error."""
        self._dropped = error
        for working in list(self._waiting):
            working.cancel()

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()


def _unreachable(what: str) -> str:
    return f"it cannot be reached ({what})"


def _model_facts(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What servers of one model have alike; a folder may have another path on each machine."""
    name = str(models[0].get("id"))
    names = [str(one.get("id")) for one in models]
    return {
        "model": name,
        "aliases": sorted(other for other in names if PurePath(other).name != PurePath(name).name),
        "context": models[0].get("max_model_len"),
        "fingerprint": models[0].get("fingerprint"),
    }


def _field(response: httpx.Response, name: str) -> Any:
    """A field of an answer in JSON; None where there is none."""
    try:
        value = response.json()
    except ValueError:
        return None
    return value.get(name) if isinstance(value, dict) else None
