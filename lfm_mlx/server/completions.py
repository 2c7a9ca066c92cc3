"""POST /v1/completions: a text goes on, without messages and templates."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.chat import Usage
from lfm_mlx.server.asking import Ask
from lfm_mlx.server.chat_completions import finish_fields
from lfm_mlx.server.endpoint import read_fields, service_of, stream_errors
from lfm_mlx.server.field_types import Either, Fields, Flag, ListOf, OneOf, Refused, Text, whole
from lfm_mlx.server.generation_fields import (
    ENDING,
    GUIDED,
    MAX_ANSWERS,
    MEANINGLESS,
    RESPONSE_FORMAT,
    SAMPLING,
    STOP,
    STREAM,
    check_stream,
    read_ending,
    read_format,
    read_sampling,
    read_stop,
)
from lfm_mlx.server.http_errors import ApiError
from lfm_mlx.server.model_service import Asked, Service
from lfm_mlx.server.sse import EventStream, event, while_connected
from lfm_mlx.server.token_logprobs import text_logprobs
from lfm_mlx.types import ContentDelta

MAX_PROMPTS = 32
MAX_LOGPROBS = 20

_IDS = ListOf(whole(0), min_len=1)
_PROMPT = Either(
    Text(), _IDS, ListOf(Text(), min_len=1, max_len=MAX_PROMPTS), ListOf(_IDS, min_len=1, max_len=MAX_PROMPTS)
)

COMPLETIONS = Fields(
    {
        "model": Text(),
        "prompt": _PROMPT,
        **SAMPLING,
        **ENDING,
        **STREAM,
        **GUIDED,
        **MEANINGLESS,
        "response_format": RESPONSE_FORMAT,
        "max_tokens": whole(1),
        "n": whole(1, MAX_ANSWERS),
        "best_of": OneOf(1, advice="give n"),
        "echo": Flag(),
        "logprobs": whole(0, MAX_LOGPROBS),
        "stop": STOP,
        "suffix": Refused("this model does not fill in"),
    },
    required=["prompt"],
)


async def completions(request: Request) -> Response:
    """Go on with a text, whole or as a stream."""
    service = service_of(request)
    fields = await read_fields(request, COMPLETIONS)
    service.check_name(fields.get("model"))
    asked = await service.ask(lambda: _questions(fields))
    writer = _Writer(service, asked, fields)
    if not fields.get("stream"):
        await while_connected(request, service.finish(asked), asked.cancel)
        return JSONResponse(writer.whole())
    chunks = stream_errors(request, writer.chunks())
    return EventStream(chunks, asked.cancel, keep_alive_s=service.settings.keep_alive_s)  # type: ignore[return-value]


def _questions(fields: Mapping[str, Any]) -> list[Ask]:
    check_stream(fields)
    if fields.get("echo") and "logprobs" in fields:
        raise ApiError("echo and logprobs were given, expected one of them; leave one out", param="logprobs")
    prompt = fields["prompt"]
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    form = read_format(fields)
    return [
        Ask(
            prompt=one,
            form=form,
            sampling=read_sampling(fields),
            max_tokens=fields.get("max_tokens"),
            stop=read_stop(fields),
            **read_ending(fields),
            top_logprobs=fields.get("logprobs"),
            num_answers=fields.get("n", 1),
        )
        for one in ([prompt] if is_one else prompt)
    ]


def _usage(answers: Sequence[Usage], num_each: int) -> dict[str, Any]:
    """Tokens of all answers, each prompt counted once."""
    firsts = answers[::num_each]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    completion = sum(usage.completion_tokens for usage in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


class _Writer:
    def __init__(self, service: Service, asked: Asked, fields: Mapping[str, Any]) -> None:
        self._service = service
        self._asked = asked
        self._num_each = fields.get("n", 1)
        self._echoes = fields.get("echo", False)
        self._has_logprobs = "logprobs" in fields
        self._has_usage = fields.get("stream_options", {}).get("include_usage", False)
        self._names = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": fields.get("model", service.name),
        }

    def _opening(self, index: int) -> str:
        """What stands in front of an answer."""
        return self._asked.prompts[index // self._num_each].text if self._echoes else ""

    def _logprobs(self, index: int, start: int, offset: int) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        return text_logprobs(self._service.tokenizer, self._asked.answers[index].logprobs[start:], offset)

    def _usage(self) -> dict[str, Any]:
        return _usage([answer.usage for answer in self._asked.answers], self._num_each)

    def whole(self) -> dict[str, Any]:
        """The object that is sent when all is written."""
        choices = [
            {
                "index": index,
                "text": self._opening(index) + answer.output.content,
                "logprobs": self._logprobs(index, 0, 0),
                **finish_fields(answer, has_calls=False),
            }
            for index, answer in enumerate(self._asked.answers)
        ]
        return {**self._names, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        answers = self._asked.answers
        num_told = [0] * len(answers)
        num_characters = [0] * len(answers)
        common = {**self._names, **({"usage": None} if self._has_usage else {})}
        is_begun = [False] * len(answers)
        async with contextlib.aclosing(self._service.events(self._asked)) as batches:
            async for index, batch, is_last in batches:
                text = "".join(one.text for one in batch if isinstance(one, ContentDelta))
                if not is_begun[index]:
                    is_begun[index], text = True, self._opening(index) + text
                logprobs = self._logprobs(index, num_told[index], num_characters[index])
                if logprobs is not None:
                    num_told[index] += len(logprobs["tokens"])
                    num_characters[index] += sum(map(len, logprobs["tokens"]))
                ending = finish_fields(answers[index], has_calls=False) if is_last else {"finish_reason": None}
                if text or is_last:
                    choice = {"index": index, "text": text, "logprobs": logprobs, **ending}
                    yield event({**common, "choices": [choice]})
        if self._has_usage:
            yield event({**common, "choices": [], "usage": self._usage()})
        yield event("[DONE]")
