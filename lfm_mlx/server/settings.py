"""What a server was told when it was started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and rules; the defaults suit one machine and its owner.

    Args:
        names: what the model may be called in requests; the first is its name.
        fingerprint: tells the model from others, wherever it lies; None where nobody compares.
        max_rows: answers that are written at once.
        max_waiting: answers that may wait for that.
        api_keys: one of them has to come with every request; none lets everybody in.
        cors_origins: pages of which sites may call; "*" is all.
        max_body_bytes: of a request.
        body_timeout_s: seconds in which a body has to arrive.
        request_timeout_s: seconds after which an answer is ended; None sets no limit.
        keep_alive_s: seconds of silence in a stream after which a comment is sent.
        max_stored_bytes: of responses that may be continued by their id.
        logs_prompts: whether the log shows what was asked and answered.
    """

    names: tuple[str, ...]
    fingerprint: str | None = None
    max_rows: int = 16
    max_waiting: int = 256
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16_000_000
    body_timeout_s: float = 60.0
    request_timeout_s: float | None = None
    keep_alive_s: float = 10.0
    max_stored_bytes: int = 64_000_000
    logs_prompts: bool = False
