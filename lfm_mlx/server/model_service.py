"""The model, what it may be asked, and what was counted: what all endpoints of one server share."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.cache import PrefixCache
from lfm_mlx.chat import Answer, AnswerOptions, RenderedPrompt
from lfm_mlx.engine import EngineThread
from lfm_mlx.model import Model
from lfm_mlx.server.answering import AnswerStream
from lfm_mlx.server.asking import Ask, Prepared, prepare
from lfm_mlx.server.blocks import BlockWriter
from lfm_mlx.server.http_errors import ApiError, closing_error
from lfm_mlx.server.metrics import Metrics
from lfm_mlx.server.request_body import BodyRoom
from lfm_mlx.server.response_store import ResponseStore
from lfm_mlx.server.settings import ServerSettings
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import OutputEvent, SamplingParams

log = logging.getLogger("lfm_mlx.server")

BODIES_AT_ONCE = 8
"""Requests of the largest size that may come in at the same time; thousands of ordinary ones."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions and the answers that are being written to them: as many to each, one after the other."""

    prompts: Sequence[RenderedPrompt]
    answers: Sequence[AnswerStream]
    sampling: SamplingParams
    started_s: float

    def cancel(self, error: Exception | None = None) -> None:
        """End the answers after the step that is being computed; who reads them gets the error."""
        for answer in self.answers:
            answer.cancel(error)


class Service:
    """One model, served.

    Args:
        model: from `lfm_mlx.load`.
        tokenizer: from `lfm_mlx.load`.
        settings: limits and rules.
        prefix_cache: what earlier prompts have computed; None computes every prompt.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, settings: ServerSettings, *, prefix_cache: PrefixCache | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.created_s = int(time.time())
        self.metrics = Metrics(self.name)
        self.engine = EngineThread(
            model, max_rows=settings.max_rows, max_waiting=settings.max_waiting, prefix_cache=prefix_cache
        )
        self._open: weakref.WeakSet[AnswerStream] = weakref.WeakSet()
        self.bodies = BodyRoom(BODIES_AT_ONCE * settings.max_body_bytes)
        self.responses = ResponseStore(settings.max_stored_bytes)
        self._is_closing = False
        self.metrics.show(self.gauges, self.totals)

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

    async def ask(self, read: Callable[[], Sequence[Ask]]) -> Asked:
        """Start to answer one question or several that are alike.

        Args:
            read: makes the questions; beside the event loop, as compiling a large schema takes a second.

        Raises:
            LfmError: the question cannot be asked, or there is no room for it now.
        """
        started_s = time.monotonic()
        if self.is_closing:
            raise closing_error()
        loop = asyncio.get_running_loop()
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, read, loop, started_s))
        try:
            asked = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_give_up)
            raise
        self._open.update(asked.answers)
        if self.settings.logs_prompts:
            for prompt in asked.prompts:
                log.info("prompt", extra={"fields": {"prompt": prompt.text}})
        return asked

    def _start(self, read: Callable[[], Sequence[Ask]], loop: asyncio.AbstractEventLoop, started_s: float) -> Asked:
        """Prepare questions and submit their answers; takes a while, so that it runs beside the event loop."""
        asks = read()
        self._check_number(sum(ask.num_answers for ask in asks))
        prepared = [prepare(self.model, self.tokenizer, ask) for ask in asks]
        answers: list[AnswerStream] = []
        try:
            for one in prepared:
                for options in one.options:
                    answers.append(AnswerStream(loop, functools.partial(self._write, one, options)))
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        prompts = [one.prompt for one in prepared]
        return Asked(prompts=prompts, answers=answers, sampling=prepared[0].sampling, started_s=started_s)

    def _check_number(self, num_answers: int) -> None:
        most = self.settings.max_rows + self.settings.max_waiting
        if num_answers > most:
            raise ApiError(
                f"the request asks for {num_answers} answers, expected at most {most}, those that are written at once "
                "(--max-rows) and those that may wait (--max-waiting); ask for fewer at a time",
                param="n",
            )

    def _write(self, prepared: Prepared, options: AnswerOptions, on_progress: Callable[[], None]) -> Answer:
        return Answer(
            self.model,
            self.tokenizer,
            prepared.prompt,
            tools=prepared.tools,
            options=options,
            is_raw=prepared.is_raw,
            engine=self.engine,
            on_progress=on_progress,
        )

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
            asked.cancel()
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
        told_s, num_told = started_s, 0
        reason = "abort"
        try:
            async with contextlib.aclosing(answer.batches()) as batches:
                async for batch in batches:
                    now_s, num_tokens = time.monotonic(), answer.usage.completion_tokens
                    if first_s is None:
                        first_s = now_s - started_s
                    else:
                        self.metrics.count_tokens(num_tokens - num_told, now_s - told_s)
                    told_s, num_told = now_s, num_tokens
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
        asked.cancel(error)

    @property
    def is_closing(self) -> bool:
        """Whether no more questions are taken."""
        return self._is_closing or not self.engine.is_alive

    def begin_closing(self) -> None:
        """Take no more questions."""
        self._is_closing = True

    def cancel_all(self) -> None:
        """End all answers, because the server closes."""
        for answer in list(self._open):
            answer.cancel(closing_error())

    def close(self) -> None:
        """End all answers and wait until nothing runs."""
        self.begin_closing()
        self.cancel_all()
        self.engine.close()
        if self.engine.prefix_cache is not None:
            self.engine.prefix_cache.close()

    @property
    def is_lost(self) -> bool:
        """Whether another rank is gone, and this process ends in a moment."""
        return self.engine.is_lost

    @property
    def num_open(self) -> int:
        """Answers that run or wait."""
        counters = self.engine.counters
        return counters.num_running + counters.num_waiting

    def gauges(self) -> dict[str, tuple[str, float]]:
        """Numbers of this moment for a monitor: text and value by name."""
        counters, cache = self.engine.counters, self.engine.prefix_cache
        return {
            "num_requests_running": ("Answers that are being written.", counters.num_running),
            "num_requests_waiting": ("Answers that wait.", counters.num_waiting),
            "kv_cache_usage_perc": (
                "Part of the memory for answers that they hold, 1 being all.",
                counters.held_bytes / max(counters.memory_bytes, 1),
            ),
            "prefix_cache_bytes": ("Bytes that the prefix cache holds.", cache.num_bytes if cache is not None else 0),
            "device_memory_bytes": ("Bytes of arrays on the device, weights included.", mx.get_active_memory()),
            "device_memory_kept_bytes": (
                "Bytes of freed buffers kept for the next step; they go back when there is nothing to do.",
                mx.get_cache_memory(),
            ),
        }

    def totals(self) -> dict[str, tuple[str, float]]:
        """Numbers that only grow: text and value by name."""
        counters = self.engine.counters
        return {
            "num_preemptions": ("Answers that lost their place because memory ran short.", counters.num_sent_back),
            "num_restarts": ("Answers that were computed again because a step failed.", counters.num_restarted),
        }


def _give_up(starting: asyncio.Future[Asked]) -> None:
    """Cancel answers that were started for nobody."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()


async def _next(source: AsyncGenerator[list[OutputEvent], None]) -> list[OutputEvent] | None:
    try:
        return await source.__anext__()
    except StopAsyncIteration:
        return None
