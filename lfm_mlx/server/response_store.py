"""Responses that later ones may continue: the latest, within a number of bytes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """A response and the conversation up to it.

    Args:
        body: as it was sent.
        messages: the conversation, the answer included, in OpenAI's form; without instructions.
    """

    body: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]


class ResponseStore:
    """The latest responses; the oldest is forgotten first.

    Args:
        max_bytes: of what they hold, counted as JSON.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, name: str, stored: StoredResponse) -> None:
        """Keep a response, as long as there is room."""
        num_bytes = len(json.dumps([stored.body, stored.messages]))
        self._stored[name] = (stored, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            self.remove(next(iter(self._stored)))

    def get(self, name: str) -> StoredResponse | None:
        """A response, if it is still there."""
        stored, _ = self._stored.get(name, (None, 0))
        if stored is not None:
            self._stored.move_to_end(name)
        return stored

    def remove(self, name: str) -> bool:
        """Forget a response; returns whether it was there."""
        _, num_bytes = self._stored.pop(name, (None, None))
        self.num_bytes -= num_bytes or 0
        return num_bytes is not None
