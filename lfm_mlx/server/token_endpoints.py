"""POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lfm_mlx.chat import as_tools, render_prompt
from lfm_mlx.server.asking import check_variables
from lfm_mlx.server.chat_completions import MESSAGE
from lfm_mlx.server.endpoint import read_fields, service_of
from lfm_mlx.server.field_types import AnyObject, Fields, Flag, ListOf, Text, whole
from lfm_mlx.server.generation_fields import TOOL
from lfm_mlx.server.http_errors import ApiError
from lfm_mlx.server.model_service import Service

TOKENIZE = Fields(
    {
        "model": Text(),
        "prompt": Text(),
        "messages": ListOf(MESSAGE, min_len=1),
        "tools": ListOf(TOOL),
        "chat_template_kwargs": AnyObject(),
        "add_generation_prompt": Flag(),
        "add_special_tokens": Flag(),
        "return_token_strs": Flag(),
    }
)
DETOKENIZE = Fields({"model": Text(), "tokens": ListOf(whole(0))}, required=["tokens"])
MIN_LIMIT = 65_536
"""Texts are counted up to so many tokens, where the context is not longer; those far beyond it are refused."""

_OF_MESSAGES = ("tools", "chat_template_kwargs", "add_generation_prompt")


async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of the prompt that messages make."""
    service = service_of(request)
    fields = await read_fields(request, TOKENIZE)
    service.check_name(fields.get("model"))
    ids = await asyncio.to_thread(_encode, service, fields)
    body: dict[str, Any] = {"count": len(ids), "max_model_len": service.model.max_context, "tokens": ids}
    if fields.get("return_token_strs"):
        body["token_strs"] = [service.tokenizer.token_bytes(one).decode("utf-8", "replace") for one in ids]
    return JSONResponse(body)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    fields = await read_fields(request, DETOKENIZE)
    service.check_name(fields.get("model"))
    return JSONResponse({"prompt": await asyncio.to_thread(service.tokenizer.decode, fields["tokens"])})


def _encode(service: Service, fields: Mapping[str, Any]) -> list[int]:
    limit = max(service.model.max_context, MIN_LIMIT)
    if ("prompt" in fields) == ("messages" in fields):
        raise ApiError("prompt and messages were given both or neither, expected one of them", param="prompt")
    if "messages" not in fields:
        for name in _OF_MESSAGES:
            if name in fields:
                raise ApiError(f"{name} was given with prompt, expected it with messages; leave it out", param=name)
        service.tokenizer.check_length(fields["prompt"], limit)
        return service.tokenizer.encode(fields["prompt"], add_bos=fields.get("add_special_tokens", True))
    if "add_special_tokens" in fields:
        raise ApiError(
            "add_special_tokens was given with messages, expected it with prompt: the template adds its own; "
            "leave it out",
            param="add_special_tokens",
        )
    variables = fields.get("chat_template_kwargs", {})
    check_variables(variables, service.tokenizer)
    prompt = render_prompt(
        service.tokenizer,
        fields["messages"],
        tools=as_tools(fields.get("tools", ())) or None,
        add_generation_prompt=fields.get("add_generation_prompt", True),
        max_tokens=limit,
        **variables,
    )
    return list(prompt.ids)
