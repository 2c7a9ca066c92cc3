"""POST /v1/responses, and GET and DELETE of a stored one."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.chat import Usage
from lfm_mlx.server.answering import AnswerStream, joined
from lfm_mlx.server.blocks import Block, BlockStep, BlockWriter
from lfm_mlx.server.endpoint import log_failure, read_fields, request_id, service_of
from lfm_mlx.server.http_errors import ApiError, as_api_error
from lfm_mlx.server.model_service import Asked, Service
from lfm_mlx.server.response_fields import RESPONSES, read_items, read_question
from lfm_mlx.server.response_store import StoredResponse
from lfm_mlx.server.sse import EventStream, event, while_connected


async def create_response(request: Request) -> Response:
    """Answer some input, whole or as a stream."""
    service = service_of(request)
    fields = await read_fields(request, RESPONSES)
    service.check_name(fields.get("model"))
    before = _messages_before(service, fields)
    asked = await service.ask(lambda: [read_question(fields, before)])
    writer = ResponseWriter(service, asked, fields, before)
    if fields.get("stream"):
        events = writer.events(request_id(request))
        return EventStream(events, asked.cancel, keep_alive_s=service.settings.keep_alive_s)  # type: ignore[return-value]
    writer.blocks = await while_connected(request, service.blocks(asked), asked.cancel)
    return JSONResponse(writer.ended())


async def show_response(request: Request) -> Response:
    """A stored response."""
    return JSONResponse(_stored(service_of(request), request.path_params["name"], None).body)


async def delete_response(request: Request) -> Response:
    """Forget a stored response."""
    name = request.path_params["name"]
    _stored(service_of(request), name, None)
    service_of(request).responses.remove(name)
    return JSONResponse({"id": name, "object": "response", "deleted": True})


def _messages_before(service: Service, fields: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    name = fields.get("previous_response_id")
    return () if name is None else _stored(service, name, "previous_response_id").messages


def _stored(service: Service, name: str, param: str | None) -> StoredResponse:
    stored = service.responses.get(name)
    if stored is None:
        raise ApiError(
            f"there is no response {name[:100]!r}, expected one that was stored and is not too old; send the "
            "conversation as input",
            status=404,
            param=param,
            code="response_not_found",
        )
    return stored


class ResponseWriter:
    """Writes one response, whole or as events.

    Args:
        service: where it is stored.
        asked: the question and its answer.
        fields: of the request.
        before: the messages that it continues.
    """

    def __init__(
        self, service: Service, asked: Asked, fields: Mapping[str, Any], before: Sequence[Mapping[str, Any]]
    ) -> None:
        self._service = service
        self._asked = asked
        self._fields = fields
        self._before = before
        self._hex = uuid.uuid4().hex
        self._created_s = int(time.time())
        self._number = 0
        self.blocks = BlockWriter()

    @property
    def _answer(self) -> AnswerStream:
        return self._asked.answers[0]

    @property
    def _status(self) -> str:
        """Of an answer that ended."""
        return "completed" if self._answer.finish_reason == "stop" else "incomplete"

    def body(self, status: str, output: Sequence[Mapping[str, Any]] = (), **changes: Any) -> dict[str, Any]:
        """The response as an object."""
        fields, sampling = self._fields, self._asked.sampling
        return {
            "id": f"resp_{self._hex}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "model": fields.get("model", self._service.name),
            "output": list(output),
            "parallel_tool_calls": fields.get("parallel_tool_calls", True),
            "previous_response_id": fields.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None, **fields.get("reasoning", {})},
            "store": fields.get("store", True),
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **fields.get("text", {})},
            "tool_choice": fields.get("tool_choice", "auto"),
            "tools": [{"strict": True, "parameters": {}, **tool} for tool in fields.get("tools", [])],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": fields.get("metadata", {}),
            "user": fields.get("user"),
            **changes,
        }

    def ended(self) -> dict[str, Any]:
        """The whole response, stored where it may be continued."""
        status, blocks = self._status, self.blocks.blocks
        output = [self._item(block, status if block is blocks[-1] else "completed") for block in blocks]
        body = self.body(
            status,
            output,
            incomplete_details=None if status == "completed" else {"reason": "max_output_tokens"},
            usage=_usage(self._answer.usage),
        )
        if self._fields.get("store", True):
            messages = [*self._before, *read_items(self._fields["input"]), *read_items(output)]
            self._service.responses.add(body["id"], StoredResponse(body=body, messages=messages))
        return body

    def _item(self, block: Block, status: str, *, is_new: bool = False) -> dict[str, Any]:
        text = "" if is_new else block.text
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": text}
            return {"id": self._item_id(block), "type": "function_call", "status": status, **call}
        content = [] if is_new else [_part(block, text)]
        own: dict[str, Any] = {"type": "message", "role": "assistant"}
        if block.kind == "reasoning":
            own = {"type": "reasoning", "summary": []}
        return {"id": self._item_id(block), "status": status, **own, "content": content}

    def _item_id(self, block: Block) -> str:
        return f"{ {'reasoning': 'rs', 'text': 'msg', 'call': 'fc'}[block.kind] }_{self._hex}{block.index}"

    async def events(self, logged_id: str) -> AsyncGenerator[bytes, None]:
        """The events of a stream; an error is the last of them.

        Args:
            logged_id: names the request in the log.
        """
        try:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self.body("in_progress"))
            async with contextlib.aclosing(self._service.events(self._asked)) as batches:
                async for _, batch, is_last in batches:
                    steps = [(one, "completed") for one in self.blocks.feed(joined(batch))]
                    if is_last:
                        steps += [(one, self._status) for one in self.blocks.finish()]
                    for one, status in steps:
                        for written in self._step(one, status):
                            yield written
            body = self.ended()
            yield self._event(f"response.{body['status']}", response=body)
        except Exception as error:  # noqa: BLE001 - the status line is gone; here a client can still be told
            api_error = as_api_error(error)
            log_failure(error, logged_id)
            told = {"code": "server_error", "message": str(api_error)}
            yield self._event("response.failed", response=self.body("failed", error=told))

    def _event(self, kind: str, **data: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **data}, kind)

    def _step(self, one: BlockStep, status: str) -> list[bytes]:
        """The events of a step of a block; `status` is how it ends, where it does."""
        block = one.block
        place: dict[str, Any] = {"item_id": self._item_id(block), "output_index": block.index}
        name = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}[block.kind]
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        in_part = {} if block.kind == "call" else {"content_index": 0}
        if one.step == "delta":
            return [self._event(f"response.{name}.delta", **place, **in_part, delta=one.text, **logprobs)]
        is_new = one.step == "start"
        item = self._item(block, "in_progress" if is_new else status, is_new=is_new)
        whole = {"output_index": block.index, "item": item}
        part = {"part": _part(block, "" if is_new else block.text)}
        if is_new:
            events = [self._event("response.output_item.added", **whole)]
            if in_part:
                events.append(self._event("response.content_part.added", **place, **in_part, **part))
            return events
        text = {"arguments": block.text, "name": item["name"]} if block.kind == "call" else {"text": block.text}
        events = [self._event(f"response.{name}.done", **place, **in_part, **text, **logprobs)]
        if in_part:
            events.append(self._event("response.content_part.done", **place, **in_part, **part))
        return [*events, self._event("response.output_item.done", **whole)]


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
