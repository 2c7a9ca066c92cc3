"""Why llguidance refuses something, for people."""

from __future__ import annotations

MAX_LEN = 400
"""Characters of a reason: it may quote all of a grammar."""


def one_line(*messages: str) -> str:
    """What llguidance says as one line, without the trace of a panic; the middle of a long one is left out."""
    text = " ".join(" ".join(message.partition("<backtrace>")[0] for message in messages).split())
    return text if len(text) <= MAX_LEN else f"{text[: MAX_LEN // 2]} ... {text[-MAX_LEN // 2 :]}"
