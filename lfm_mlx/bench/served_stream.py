"""A client that times what it hears: one request to an OpenAI-like server, streamed."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lfm_mlx.errors import LfmError

TIMEOUT_S = 600.0

TRIES, RETRY_S = 20, 0.1
"""A server whose queue of connections is short (mlx-lm's holds five) resets some of many at once; clients try again."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What came back for one request.

    Args:
        asked_s: when it was sent, by the clock of `time.perf_counter`.
        times_s: when each piece of text or of a call came, by the same clock.
        message: the whole answer as a message that a next request may hold.
        prompt_tokens, completion_tokens, cached_tokens: as the server counts; 0 where the stream was cut.
    """

    asked_s: float
    times_s: Sequence[float]
    message: Mapping[str, Any]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def first_s(self) -> float:
        """Seconds to the first piece.

        Raises:
            LfmError: none came.
        """
        if not self.times_s:
            raise LfmError("a server answered without a token, expected one at least; choose other prompts")
        return self.times_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces."""
        return [later - sooner for sooner, later in itertools.pairwise(self.times_s)]


def ask(port: int, body: Mapping[str, Any], *, until: threading.Event | None = None) -> Heard:
    """Send one request and read its stream to the end, or until an event hangs up.

    Raises:
        LfmError: the server refuses or breaks off.
    """
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    times: list[float] = []
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    usage: Mapping[str, Any] = {}
    asked_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        try:
            response = _answer_to(port, payload, stack)
            if response.status != 200:
                raise LfmError(f"a server answered {response.status}: {response.read()[:300]!r}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise LfmError(f"a server broke a stream off: {chunk['error']}")
                usage = chunk.get("usage") or usage
                if any(_add(message, choice["delta"]) for choice in chunk["choices"]):
                    times.append(time.perf_counter())
                if until is not None and until.is_set():
                    break
        except (OSError, http.client.HTTPException) as error:
            raise LfmError(f"a server broke a stream off: {error!r}") from error
    details = usage.get("prompt_tokens_details") or {}
    return Heard(
        asked_s=asked_s,
        times_s=times,
        message=message,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        cached_tokens=details.get("cached_tokens") or 0,
    )


def _answer_to(port: int, payload: str, stack: contextlib.ExitStack) -> http.client.HTTPResponse:
    """What begins to come back for a request, on a connection that ends with the stack."""
    num_tries = 0
    while True:
        num_tries += 1
        connection = stack.enter_context(
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S))
        )
        try:
            connection.request("POST", "/v1/chat/completions", payload, {"content-type": "application/json"})
            return connection.getresponse()
        except ConnectionError:
            if num_tries == TRIES:
                raise
            time.sleep(RETRY_S)


def _add(message: dict[str, Any], delta: Mapping[str, Any]) -> bool:
    """Put a delta into a message; whether anything was in it."""
    thought = delta.get("reasoning") or ""
    content = delta.get("content") or ""
    calls = delta.get("tool_calls") or []
    message["content"] += content
    if thought:
        message["reasoning"] = message.get("reasoning", "") + thought
    for call in calls:
        known = message.setdefault("tool_calls", [])
        if call.get("id"):
            known.append({"id": call["id"], "type": "function", "function": {"name": "", "arguments": ""}})
        for name in ("name", "arguments"):
            known[-1]["function"][name] += call["function"].get(name) or ""
    return bool(thought or content or calls)


def ask_all(port: int, bodies: Sequence[Mapping[str, Any]], num_clients: int) -> list[Heard]:
    """Send requests by so many clients at once, each one after the other."""
    with ThreadPoolExecutor(num_clients) as clients:
        return list(clients.map(lambda body: ask(port, body), bodies))
