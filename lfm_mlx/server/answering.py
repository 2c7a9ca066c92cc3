"""Answers for an event loop: the one place where the server meets the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from lfm_mlx.chat import Answer, Usage
from lfm_mlx.engine import TokenLogprob
from lfm_mlx.parsing import ParsedOutput
from lfm_mlx.types import ContentDelta, FinishReason, OutputEvent, ReasoningDelta

WriteAnswer = Callable[[Callable[[], None]], Answer]
"""Starts an answer in the engine; it calls back, from the engine's thread, when there may be news."""


class AnswerStream:
    """One answer while it is written; read on the event loop that is given.

    What nobody reads stays with the answer, which is no longer than its limit of tokens.

    Args:
        loop: where it is read.
        write: starts the answer.

    Raises:
        LfmError: the answer cannot be started.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, write: WriteAnswer) -> None:
        self._loop = loop
        self._news = asyncio.Event()
        self._is_told = False
        self._cancel_error: Exception | None = None
        self._answer = write(self._tell)

    def _tell(self) -> None:
        """Wake the reader; called from the engine's thread at every token, which is why it does little."""
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(RuntimeError):  # The loop was closed: nobody reads any more.
                self._loop.call_soon_threadsafe(self._news.set)

    def cancel(self, error: Exception | None = None) -> None:
        """End the answer after the step that is being computed; who reads it gets the error, where one is given, now:
        a step may be a long piece of a prompt."""
        self._cancel_error = self._cancel_error or error
        self._answer.cancel()
        if error is not None:
            self._tell()

    async def batches(self) -> AsyncGenerator[list[OutputEvent], None]:
        """What has come since the last time, until the end; leaving early cancels the answer.

        Raises:
            Exception: what ended the answer, where that was an error.
        """
        try:
            while self._answer.finish_reason is None and self._cancel_error is None:
                await self._news.wait()
                self._news.clear()
                self._is_told = False  # Before looking: what comes from now on is told again.
                if batch := self._answer.take():
                    yield batch
            if self._answer.finish_reason == "error":
                raise self._answer.error or RuntimeError("the engine gave an answer up")
            if self._cancel_error is not None and self._answer.finish_reason in (None, "cancelled"):
                raise self._cancel_error
        finally:
            self._answer.cancel()

    @property
    def output(self) -> ParsedOutput:
        """What was written so far."""
        return self._answer.output

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self._answer.usage

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of the tokens so far, where they were asked for."""
        return self._answer.logprobs

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it; None where none did."""
        return self._answer.stop_string

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._answer.finish_reason


def joined(batch: list[OutputEvent]) -> list[OutputEvent]:
    """Events with neighbouring pieces of text put together: one that waited is sent as one."""
    events: list[OutputEvent] = []
    for one in batch:
        last = events[-1] if events else None
        if isinstance(one, ContentDelta) and isinstance(last, ContentDelta):
            events[-1] = ContentDelta(text=last.text + one.text)
        elif isinstance(one, ReasoningDelta) and isinstance(last, ReasoningDelta):
            events[-1] = ReasoningDelta(text=last.text + one.text)
        else:
            events.append(one)
    return events
