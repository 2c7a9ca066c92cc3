"""Answers for an event loop: the one place where the server meets `lfm_mlx.chat.Answer`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

from lfm_mlx.chat import Answer, Usage
from lfm_mlx.parsing import ParsedOutput
from lfm_mlx.server.http_errors import RETRY_AFTER_S, ApiError
from lfm_mlx.types import ContentDelta, FinishReason, OutputEvent, ReasoningDelta


class AnswerStream:
    """One answer while it is written; belongs to the event loop that it was made on.

    Args:
        make: makes the answer; called in a thread.
        on_end: called on the loop when it has ended.
    """

    def __init__(self, make: Callable[[], Answer], on_end: Callable[[], None]) -> None:
        self._make = make
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._lock = threading.Lock()
        self._pending: list[OutputEvent] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._cancel_error: Exception | None = None
        self._is_over = False

    def work(self) -> None:
        """Write the answer; runs in a thread."""
        try:
            answer = self._make()
            self._answer = answer
            if self._is_cancelled:
                answer.cancel()
            for event in answer:
                with self._lock:
                    self._pending.append(event)
                self._loop.call_soon_threadsafe(self._news.set)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the answer is read
            self._error = error
        finally:
            self._is_over = True
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._news.set()
        self._on_end()

    def cancel(self, error: Exception | None = None) -> None:
        """End the answer after the step that is being computed; who reads it gets the error, where one is given."""
        if not self._is_cancelled:
            self._cancel_error = error
        self._is_cancelled = True
        if self._answer is not None:
            self._answer.cancel()

    async def batches(self) -> AsyncGenerator[list[OutputEvent], None]:
        """What has come since the last time, until the end; leaving early cancels the answer."""
        try:
            while True:
                is_last = self._is_over
                with self._lock:
                    batch, self._pending = self._pending, []
                if batch:
                    yield batch
                if is_last:
                    break
                await self._news.wait()
                self._news.clear()
            if self._error is not None:
                raise self._error
            if self._cancel_error is not None and self.finish_reason == "cancelled":
                raise self._cancel_error
        finally:
            self.cancel()

    @property
    def output(self) -> ParsedOutput:
        """What was written so far."""
        assert self._answer is not None
        return self._answer.output

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self._answer.usage if self._answer is not None else Usage()

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it; None where none did."""
        return None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._answer.finish_reason if self._answer is not None else None


class Answering:
    """Runs answers, so many at once, and lets so many wait."""

    def __init__(self, *, max_rows: int, max_waiting: int) -> None:
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._threads = ThreadPoolExecutor(max_rows, thread_name_prefix="answer")
        self._open: set[AnswerStream] = set()

    @property
    def num_open(self) -> int:
        """Answers that run or wait."""
        return len(self._open)

    def check_room(self, num_answers: int) -> None:
        """Refuse answers that there is no room for.

        Raises:
            ApiError: with the numbers.
        """
        limit = self._max_rows + self._max_waiting
        if len(self._open) + num_answers > limit:
            raise ApiError(
                f"{len(self._open)} answers run or wait, expected at most {limit} with this request's {num_answers}; "
                "try again later",
                status=503,
                code="queue_full",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )

    def start(self, make: Callable[[], Answer]) -> AnswerStream:
        """Start an answer."""
        stream = AnswerStream(make, lambda: self._open.discard(stream))
        self._open.add(stream)
        self._threads.submit(stream.work)
        return stream

    def gauges(self) -> dict[str, tuple[str, float]]:
        """Numbers for the metrics."""
        running = min(len(self._open), self._max_rows)
        return {
            "num_requests_running": ("Answers that are being written.", running),
            "num_requests_waiting": ("Answers that wait.", len(self._open) - running),
        }

    def cancel_all(self, error: Exception | None = None) -> None:
        """End all answers soon."""
        for stream in list(self._open):
            stream.cancel(error)

    def close(self) -> None:
        """End all answers and wait for the threads."""
        self.cancel_all()
        self._threads.shutdown(wait=True, cancel_futures=True)


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
