"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.chat import Usage
from lfm_mlx.server.answering import AnswerStream, joined
from lfm_mlx.server.asking import Ask
from lfm_mlx.server.endpoint import read_fields, service_of, stream_errors
from lfm_mlx.server.field_types import (
    AnyObject,
    Either,
    Fields,
    Flag,
    ListOf,
    OneOf,
    Refused,
    Tagged,
    Text,
    whole,
)
from lfm_mlx.server.generation_fields import (
    EFFORTS,
    ENDING,
    GUIDED,
    MAX_ANSWERS,
    MAX_TOP_LOGPROBS,
    MEANINGLESS,
    NAMED_FUNCTION,
    OLD_FUNCTIONS,
    RESPONSE_FORMAT,
    SAMPLING,
    STOP,
    STREAM,
    TOOL,
    check_stream,
    read_ending,
    read_format,
    read_max_tokens,
    read_sampling,
    read_stop,
)
from lfm_mlx.server.http_errors import ApiError
from lfm_mlx.server.model_service import Asked, Service
from lfm_mlx.server.sse import EventStream, event, while_connected
from lfm_mlx.server.token_logprobs import chat_logprobs
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import ContentDelta, ReasoningDelta, ToolCall, ToolCallDone

_TEXT_PART = Fields({"type": Text(), "text": Text()}, required=["text"])
_PART = Tagged("type", {"text": _TEXT_PART}, advice="this model reads text only")
_CONTENT = Either(Text(), ListOf(_PART))
_CALL = Fields(
    {
        "id": Text(),
        "type": OneOf("function"),
        "index": whole(0),
        "function": Fields({"name": Text(min_len=1), "arguments": Either(Text(), AnyObject())}, required=["name"]),
    },
    required=["function"],
)

MESSAGE = Tagged(
    "role",
    {
        "system": Fields({"role": Text(), "content": _CONTENT, "name": Text()}, required=["content"]),
        "developer": Fields({"role": Text(), "content": _CONTENT, "name": Text()}, required=["content"]),
        "user": Fields({"role": Text(), "content": _CONTENT, "name": Text()}, required=["content"]),
        "assistant": Fields(
            {
                "role": Text(),
                "content": _CONTENT,
                "name": Text(),
                "tool_calls": ListOf(_CALL),
                "reasoning_content": Text(),
                "reasoning": Text(),
                "refusal": Refused("leave it out, or make it the content"),
                "audio": Refused("this model reads text only"),
                "annotations": ListOf(AnyObject(), max_len=0),
                "function_call": Refused("give tool_calls instead"),
            }
        ),
        "tool": Fields(
            {"role": Text(), "content": _CONTENT, "tool_call_id": Text(), "name": Text()}, required=["content"]
        ),
    },
)

TOOL_CHOICE = Either(
    OneOf("auto", "none", "required"),
    Tagged("type", {"function": Fields({"type": Text(), "function": NAMED_FUNCTION}, required=["function"])}),
)

CHAT = Fields(
    {
        "model": Text(),
        "messages": ListOf(MESSAGE, min_len=1),
        **SAMPLING,
        **ENDING,
        **STREAM,
        **GUIDED,
        **MEANINGLESS,
        **OLD_FUNCTIONS,
        "max_tokens": whole(1),
        "max_completion_tokens": whole(1),
        "n": whole(1, MAX_ANSWERS),
        "stop": STOP,
        "logprobs": Flag(),
        "top_logprobs": whole(0, MAX_TOP_LOGPROBS),
        "tools": ListOf(TOOL),
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": Flag(),
        "response_format": RESPONSE_FORMAT,
        "reasoning_effort": OneOf(*EFFORTS),
        "thinking_budget": whole(0),
        "chat_template_kwargs": AnyObject(),
        "store": OneOf(False, advice="nothing is stored"),
        "modalities": ListOf(OneOf("text", advice="this model writes text only")),
        "verbosity": OneOf("medium", advice="this model knows no other"),
        "audio": Refused("this model writes text only"),
        "prediction": Refused("leave it out"),
        "web_search_options": Refused("give a tool that searches"),
    },
    required=["messages"],
)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    service = service_of(request)
    fields = await read_fields(request, CHAT)
    service.check_name(fields.get("model"))
    asked = await service.ask(lambda: [read_ask(fields)])
    names = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": fields.get("model", service.name),
    }
    has_logprobs = fields.get("logprobs", False)
    if not fields.get("stream"):
        await while_connected(request, service.finish(asked), asked.cancel)
        return JSONResponse(whole_answer(service.tokenizer, asked, names, has_logprobs=has_logprobs))
    include_usage = fields.get("stream_options", {}).get("include_usage", False)
    chunks = stream_chunks(service, asked, names, include_usage=include_usage, has_logprobs=has_logprobs)
    return EventStream(  # type: ignore[return-value]
        stream_errors(request, chunks), asked.cancel, keep_alive_s=service.settings.keep_alive_s
    )


def read_ask(fields: Mapping[str, Any]) -> Ask:
    """The question that a request's fields ask.

    Raises:
        ApiError: fields contradict one another.
    """
    check_stream(fields)
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise ApiError("top_logprobs was given without logprobs, expected both; give logprobs", param="top_logprobs")
    tools = fields.get("tools", [])
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = choice["function"]["name"]
    return Ask(
        messages=fields["messages"],
        tools=tools,
        tool_choice=choice,
        is_parallel=fields.get("parallel_tool_calls", True),
        form=read_format(fields),
        sampling=read_sampling(fields),
        max_tokens=read_max_tokens(fields, "max_tokens", "max_completion_tokens"),
        stop=read_stop(fields),
        **read_ending(fields),
        thinking_budget=read_budget(fields),
        variables=fields.get("chat_template_kwargs", {}),
        top_logprobs=fields.get("top_logprobs", 0) if fields.get("logprobs") else None,
        num_answers=fields.get("n", 1),
    )


def read_budget(fields: Mapping[str, Any]) -> int | None:
    """The most tokens of reasoning, from thinking_budget or reasoning_effort.

    Raises:
        ApiError: both are given.
    """
    if "thinking_budget" in fields and "reasoning_effort" in fields:
        raise ApiError(
            "thinking_budget and reasoning_effort were given, expected one of them; leave one out",
            param="thinking_budget",
        )
    budget: int | None = fields.get("thinking_budget", EFFORTS[fields.get("reasoning_effort", "high")])
    return budget


def usage_of(answers: list[Usage]) -> dict[str, Any]:
    """Tokens of a question's answers, its prompt counted once."""
    first = answers[0]
    completion = sum(usage.completion_tokens for usage in answers)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in answers)},
    }


def finish_fields(answer: AnswerStream, *, has_calls: bool) -> dict[str, Any]:
    """Why an answer ended, in OpenAI's words; an answer that was ended because it repeated itself was cut off."""
    reason = answer.finish_reason
    if reason == "repetition":
        return {"finish_reason": "length", "stop_reason": "repetition"}
    if reason == "stop" and has_calls:
        return {"finish_reason": "tool_calls", "stop_reason": None}
    return {"finish_reason": "length" if reason == "length" else "stop", "stop_reason": None}


def call_object(call: ToolCall) -> dict[str, Any]:
    """A call as a message holds it."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }


def whole_answer(tokenizer: Tokenizer, asked: Asked, names: Mapping[str, Any], *, has_logprobs: bool) -> dict[str, Any]:
    """The object that is sent when all is written."""
    choices = []
    for index, answer in enumerate(asked.answers):
        output = answer.output
        message: dict[str, Any] = {"role": "assistant", "content": output.content or None, "refusal": None}
        if not output.tool_calls:
            message["content"] = output.content
        if output.reasoning is not None:
            message |= {"reasoning_content": output.reasoning, "reasoning": output.reasoning}
        if output.tool_calls:
            message["tool_calls"] = [call_object(call) for call in output.tool_calls]
        ending = finish_fields(answer, has_calls=bool(output.tool_calls))
        logprobs = chat_logprobs(tokenizer, answer.logprobs) if has_logprobs else None
        choices.append({"index": index, "message": message, "logprobs": logprobs, **ending})
    usage = usage_of([answer.usage for answer in asked.answers])
    return {**names, "object": "chat.completion", "choices": choices, "usage": usage}


async def stream_chunks(
    service: Service, asked: Asked, names: Mapping[str, Any], *, include_usage: bool, has_logprobs: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, as text."""
    num_calls = [0] * len(asked.answers)
    num_told = [0] * len(asked.answers)
    common = {**names, "object": "chat.completion.chunk"} | ({"usage": None} if include_usage else {})

    def logprobs(index: int) -> dict[str, Any] | None:
        """Those that came since the last chunk."""
        found = asked.answers[index].logprobs[num_told[index] :] if has_logprobs else []
        num_told[index] += len(found)
        return chat_logprobs(service.tokenizer, found) if found else None

    def chunk(index: int, delta: Mapping[str, Any], **ending: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs(index), "finish_reason": None, **ending}
        return event({**common, "choices": [choice]})

    for index in range(len(asked.answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async with contextlib.aclosing(service.events(asked)) as batches:
        async for index, batch, is_last in batches:
            for one in joined(batch):
                if isinstance(one, ToolCallDone):
                    for delta in call_deltas(one.call, num_calls[index]):
                        yield chunk(index, delta)
                    num_calls[index] += 1
                elif isinstance(one, ReasoningDelta):
                    yield chunk(index, {"reasoning_content": one.text, "reasoning": one.text})
                elif isinstance(one, ContentDelta):
                    yield chunk(index, {"content": one.text})
            if is_last:
                yield chunk(index, {}, **finish_fields(asked.answers[index], has_calls=num_calls[index] > 0))
    if include_usage:
        usage = usage_of([answer.usage for answer in asked.answers])
        yield event({**common, "choices": [], "usage": usage})
    yield event("[DONE]")


def call_deltas(call: ToolCall, number: int) -> list[dict[str, Any]]:
    """A call as the two deltas that clients put together: name, then arguments."""
    whole_call = call_object(call)
    arguments = whole_call["function"].pop("arguments")
    whole_call["function"]["arguments"] = ""
    return [
        {"tool_calls": [{"index": number, **whole_call}]},
        {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]},
    ]
