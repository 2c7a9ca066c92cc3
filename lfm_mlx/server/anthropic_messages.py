"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.chat import Usage
from lfm_mlx.server.answering import AnswerStream, joined
from lfm_mlx.server.anthropic_fields import COUNT, MESSAGES, read_question
from lfm_mlx.server.asking import prepare
from lfm_mlx.server.blocks import Block, BlockStep, BlockWriter
from lfm_mlx.server.endpoint import read_fields, service_of, stream_errors
from lfm_mlx.server.model_service import Asked, Service
from lfm_mlx.server.sse import EventStream, event, while_connected


async def messages(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    service = service_of(request)
    fields = await read_fields(request, MESSAGES)
    service.check_name(fields.get("model"))
    asked = await service.ask(lambda: [read_question(fields)])
    names = {"id": f"msg_{uuid.uuid4().hex}", "model": fields.get("model", service.name)}
    if fields.get("stream"):
        events = stream_errors(request, _events(service, asked, names))
        return EventStream(events, asked.cancel, keep_alive_s=service.settings.keep_alive_s)  # type: ignore[return-value]
    blocks = await while_connected(request, service.blocks(asked), asked.cancel)
    ending = _ending(asked.answers[0], blocks)
    content = [_content(block) for block in blocks.blocks]
    return JSONResponse(_message(names, content, _usage(asked.answers[0].usage), ending))


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation's prompt has."""
    service = service_of(request)
    fields = await read_fields(request, COUNT)
    service.check_name(fields.get("model"))
    prepared = await asyncio.to_thread(lambda: prepare(service.model, service.tokenizer, read_question(fields)))
    return JSONResponse({"input_tokens": len(prepared.prompt.ids)})


def _message(
    names: Mapping[str, Any], content: list[dict[str, Any]], usage: Mapping[str, Any], ending: Mapping[str, Any]
) -> dict[str, Any]:
    return {**names, "type": "message", "role": "assistant", "content": content, **ending, "usage": usage}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _ending(answer: AnswerStream, blocks: BlockWriter) -> dict[str, Any]:
    """Why an answer ended, in Anthropic's words."""
    reason = answer.finish_reason
    if reason != "stop":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if (found := answer.stop_string) is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": found}
    return {"stop_reason": "tool_use" if blocks.has_calls else "end_turn", "stop_sequence": None}


def _content(block: Block, *, is_new: bool = False) -> dict[str, Any]:
    """A block as a message holds it; one that has just begun is empty."""
    text = "" if is_new else block.text
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    if block.call is not None:
        arguments = {} if is_new else block.call.arguments
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": arguments}
    return {"type": "text", "text": text}


_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _step_event(one: BlockStep) -> bytes:
    block = one.block
    kind = f"content_block_{one.step}"
    body: dict[str, Any] = {"type": kind, "index": block.index}
    if one.step == "start":
        body["content_block"] = _content(block, is_new=True)
    elif one.step == "delta":
        name, key = _DELTAS[block.kind]
        body["delta"] = {"type": name, key: one.text}
    return event(body, kind)


async def _events(service: Service, asked: Asked, names: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
    answer, blocks, is_begun = asked.answers[0], BlockWriter(), False
    async with contextlib.aclosing(service.events(asked)) as batches:
        async for _, batch, is_last in batches:
            if not is_begun:
                # What was found in the cache is known by now.
                is_begun = True
                usage = {**_usage(answer.usage), "output_tokens": 0}
                start = _message(names, [], usage, {"stop_reason": None, "stop_sequence": None})
                yield event({"type": "message_start", "message": start}, "message_start")
            for one in [*blocks.feed(joined(batch)), *(blocks.finish() if is_last else ())]:
                yield _step_event(one)
    body = {"type": "message_delta", "delta": _ending(answer, blocks), "usage": _usage(answer.usage)}
    yield event(body, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")
