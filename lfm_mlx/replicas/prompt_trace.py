"""What a prompt begins with, as hashes: from the fields of a request alone, without template or tokenizer.

A conversation's trace grows at its end only: every message ends a piece, and what clients move about from turn to turn
is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PIECE_CHARS = 1024
"""Longer texts are cut into pieces of this size; the prefix cache keeps blocks of 256 tokens."""

_MOVED = frozenset({"cache_control"})
"""Keys that clients set at the latest message only."""

_LEADING = ("system", "developer")


@dataclass(frozen=True, kw_only=True)
class PromptTrace:
    """A prompt as a chain of pieces.

    Args:
        hashes: one for each piece; two prompts have the same one where all is equal up to the end of that piece.
        ends: characters up to there.
        response: the id of the stored response that the request continues or means.
    """

    hashes: Sequence[bytes] = ()
    ends: Sequence[int] = ()
    response: str | None = None

    @property
    def num_chars(self) -> int:
        """Characters of the prompt."""
        return self.ends[-1] if self.ends else 0


def trace_of(fields: object) -> PromptTrace:
    """The trace of a request's JSON value, whichever interface it belongs to; what is no request has an empty one."""
    if not isinstance(fields, Mapping):
        return PromptTrace()
    hashes: list[bytes] = []
    ends: list[int] = []
    last, end = b"", 0
    for text in _texts(fields):
        for start in range(0, len(text), PIECE_CHARS):
            piece = text[start : start + PIECE_CHARS]
            last = hashlib.blake2b(last + piece.encode("utf-8", "replace"), digest_size=8).digest()
            end += len(piece)
            hashes.append(last)
            ends.append(end)
    response = fields.get("previous_response_id")
    return PromptTrace(hashes=hashes, ends=ends, response=response if isinstance(response, str) else None)


def _texts(fields: Mapping[str, Any]) -> Iterator[str]:
    """The parts of a prompt in the order in which templates write them: system, tools, messages."""
    for name in ("instructions", "system"):
        yield _flat(fields.get(name))
    messages = fields.get("messages", fields.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = list(messages) if isinstance(messages, list) else []
    while messages and isinstance(messages[0], Mapping) and messages[0].get("role") in _LEADING:
        yield _flat(messages.pop(0))
    yield _flat(fields.get("tools"))
    for message in messages:
        yield _flat(message)
    prompt = fields.get("prompt")
    yield prompt if isinstance(prompt, str) else _flat(prompt)


def _flat(value: object) -> str:
    """A JSON value as text; a list of text blocks reads like the text itself."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), str) and str(value.get("type", "")).endswith("text"):
            return str(value["text"])
        shown = [f"{key}: {_flat(value[key])}\n" for key in sorted(value) if key not in _MOVED]
        return "".join(shown)
    if isinstance(value, list):
        are_ids = bool(value) and isinstance(value[0], int)
        return json.dumps(value) if are_ids else "".join(_flat(item) for item in value)
    return "" if value is None else str(value)
