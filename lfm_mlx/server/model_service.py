"""The model, what it may be asked, and what was counted: what all endpoints of one server share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from lfm_mlx.chat import Answer, RenderedPrompt
from lfm_mlx.model import Model
from lfm_mlx.server.answering import Answering, AnswerStream
from lfm_mlx.server.asking import Ask, prepare
from lfm_mlx.server.blocks import BlockWriter
from lfm_mlx.server.http_errors import ApiError
from lfm_mlx.server.metrics import Metrics
from lfm_mlx.server.response_store import ResponseStore
from lfm_mlx.server.settings import ServerSettings
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import OutputEvent, SamplingParams

log = logging.getLogger("lfm_mlx.server")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question and the answers that are being written to it."""

    prompt: RenderedPrompt
    answers: Sequence[AnswerStream]
    sampling: SamplingParams
    started_s: float


class Service:
    """One model, served.

    Args:
        model: from `lfm_mlx.load`.
        tokenizer: from `lfm_mlx.load`.
        settings: limits and rules.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.created_s = int(time.time())
        self.metrics = Metrics(self.name)
        self.answering = Answering(max_rows=settings.max_rows, max_waiting=settings.max_waiting)
        self.responses = ResponseStore(settings.max_stored_bytes)
        self.is_closing = False
        self.metrics.gauges(self.answering.gauges)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.settings.names[0]

    def check_name(self, name: str | None) -> None:
        """Refuse a model that is not the one here; None means that.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in self.settings.names:
            raise ApiError(
                f"model is {name[:200]!r}, expected {' or '.join(map(repr, self.settings.names))}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def ask(self, ask: Ask) -> Asked:
        """Start to answer.

        Raises:
            LfmError: the question cannot be asked, or there is no room for it now.
        """
        started_s = time.monotonic()
        if self.is_closing:
            raise closing_error()
        self.answering.check_room(ask.num_answers)
        prepared = await asyncio.to_thread(prepare, self.model, self.tokenizer, ask)
        self.answering.check_room(ask.num_answers)
        if self.settings.logs_prompts:
            log.info("prompt", extra={"fields": {"prompt": prepared.prompt.text}})
        answers = [
            self.answering.start(
                lambda options=options: Answer(  # type: ignore[misc]
                    self.model, self.tokenizer, prepared.prompt, tools=prepared.tools, options=options
                )
            )
            for options in prepared.options
        ]
        return Asked(prompt=prepared.prompt, answers=answers, sampling=prepared.sampling, started_s=started_s)

    async def events(self, asked: Asked) -> AsyncGenerator[tuple[int, list[OutputEvent], bool], None]:
        """What the answers of a question come to: the number of an answer, its next events, and whether they are its
        last. Leaving early cancels all of them.

        Raises:
            LfmError: an answer failed or took too long.
        """
        timer = None
        if self.settings.request_timeout_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self.settings.request_timeout_s, self._end_late, asked)
        sources = [self._counted(answer, asked.started_s) for answer in asked.answers]
        waiting = {asyncio.ensure_future(_next(source)): number for number, source in enumerate(sources)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: waiting[task]):
                    number = waiting.pop(task)
                    batch = task.result()
                    if batch is not None:
                        waiting[asyncio.ensure_future(_next(sources[number]))] = number
                    yield number, batch or [], batch is None
        finally:
            if timer is not None:
                timer.cancel()
            for answer in asked.answers:
                answer.cancel()
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)
            for source in sources:
                await source.aclose()

    async def finish(self, asked: Asked) -> None:
        """Wait until all answers are written."""
        async with contextlib.aclosing(self.events(asked)) as events:
            async for _ in events:
                pass

    async def blocks(self, asked: Asked) -> BlockWriter:
        """The blocks of a question's only answer, when all is written."""
        blocks = BlockWriter()
        async with contextlib.aclosing(self.events(asked)) as events:
            async for _, batch, _ in events:
                for _ in blocks.feed(batch):
                    pass
        for _ in blocks.finish():
            pass
        return blocks

    async def _counted(self, answer: AnswerStream, started_s: float) -> AsyncGenerator[list[OutputEvent], None]:
        first_s: float | None = None
        reason = "abort"
        try:
            async with contextlib.aclosing(answer.batches()) as batches:
                async for batch in batches:
                    first_s = first_s or time.monotonic() - started_s
                    yield batch
            reason = answer.finish_reason or "abort"
        finally:
            whole_s = time.monotonic() - started_s
            self.metrics.count_answer(answer.usage, reason, first_s=first_s, whole_s=whole_s)

    def _end_late(self, asked: Asked) -> None:
        limit_s = self.settings.request_timeout_s
        error = ApiError(
            f"the answer took longer than {limit_s:g} s, expected less; ask for fewer tokens (max_tokens) or start the "
            "server with a larger --request-timeout",
            status=504,
            code="timeout",
        )
        for answer in asked.answers:
            answer.cancel(error)

    def begin_closing(self) -> None:
        """Take no more questions."""
        self.is_closing = True

    def cancel_all(self) -> None:
        """End all answers, because the server closes."""
        self.answering.cancel_all(closing_error())

    def close(self) -> None:
        """End all answers and wait until nothing runs."""
        self.begin_closing()
        self.cancel_all()
        self.answering.close()


async def _next(source: AsyncGenerator[list[OutputEvent], None]) -> list[OutputEvent] | None:
    try:
        return await source.__anext__()
    except StopAsyncIteration:
        return None


def closing_error() -> ApiError:
    """What is answered while the server closes."""
    return ApiError(
        "the server is shutting down; try again when it is back", status=503, code="shutting_down", closes=True
    )
