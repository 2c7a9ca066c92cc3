"""The fields that the OpenAI interfaces share: how an answer is drawn, and what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm_mlx.constrain import Choice, Constraint, JsonObject, JsonSchema, Lark, Regex
from lfm_mlx.errors import OptionError
from lfm_mlx.server.field_types import (
    AnyObject,
    Either,
    Fields,
    FieldType,
    Flag,
    ListOf,
    Number,
    OneOf,
    Refused,
    Tagged,
    Text,
    whole,
)
from lfm_mlx.server.http_errors import ApiError

MAX_ANSWERS = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16

TEXT_OR_NOTHING = Text()

SAMPLING: Mapping[str, FieldType] = {
    "temperature": Number(0),
    "top_p": Number(maximum=1, above=0),
    "top_k": whole(-1),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(above=0),
    "presence_penalty": Number(),
    "frequency_penalty": Number(),
    "seed": whole(0, 2**64 - 1),
    "logit_bias": AnyObject(Number(-100, 100)),
}
"""How tokens are drawn; what is not given is the model card's."""

STOP = Either(Text(min_len=1), ListOf(Text(min_len=1), max_len=MAX_STOPS))

STREAM: Mapping[str, FieldType] = {
    "stream": Flag(),
    "stream_options": Fields({"include_usage": Flag(), "include_obfuscation": OneOf(False)}),
}

MEANINGLESS: Mapping[str, FieldType] = {
    "user": Text(),
    "safety_identifier": Text(),
    "prompt_cache_key": Text(),
    "metadata": AnyObject(Text()),
    "service_tier": OneOf("auto", "default"),
}
"""Taken and not used: one tier, a cache that needs no key, nobody to report to."""

ENDING: Mapping[str, FieldType] = {"loop_guard": Flag(), "ignore_eos": Flag()}
"""Whether an answer that goes round in circles is ended, and, as vLLM calls it, whether the model may not end it."""

GUIDED: Mapping[str, FieldType] = {
    "guided_json": AnyObject(),
    "guided_regex": Text(min_len=1),
    "guided_choice": ListOf(Text(min_len=1), min_len=1),
    "guided_grammar": Text(min_len=1),
}
"""vLLM's names."""

JSON_SCHEMA_FIELDS: Mapping[str, FieldType] = {
    "name": Text(),
    "description": Text(),
    "schema": AnyObject(),
    "strict": Flag(),
}

RESPONSE_FORMAT = Tagged(
    "type",
    {
        "text": Fields({"type": Text()}),
        "json_object": Fields({"type": Text()}),
        "json_schema": Fields(
            {"type": Text(), "json_schema": Fields(JSON_SCHEMA_FIELDS, required=["schema"])}, required=["json_schema"]
        ),
        "regex": Fields({"type": Text(), "regex": Text(min_len=1)}, required=["regex"]),
        "choice": Fields({"type": Text(), "choice": ListOf(Text(min_len=1), min_len=1)}, required=["choice"]),
        "grammar": Fields({"type": Text(), "grammar": Text(min_len=1)}, required=["grammar"]),
    },
)

EFFORTS: Mapping[str, int | None] = {
    "none": 0,
    "minimal": 128,
    "low": 512,
    "medium": 2048,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""Most tokens of reasoning, by effort; None sets no limit."""

FUNCTION = Fields(
    {"name": Text(min_len=1), "description": Text(), "parameters": AnyObject(), "strict": Flag()}, required=["name"]
)
TOOL = Tagged(
    "type",
    {"function": Fields({"type": Text(), "function": FUNCTION}, required=["function"])},
    advice="this server runs no tools itself",
)
NAMED_FUNCTION = Fields({"name": Text(min_len=1)}, required=["name"])

OLD_FUNCTIONS: Mapping[str, FieldType] = {
    "functions": Refused("give tools instead"),
    "function_call": Refused("give tool_choice instead"),
}


def read_sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SamplingParams` that a request gives.

    Raises:
        ApiError: a key of logit_bias is no token id.
    """
    given = {name: fields[name] for name in SAMPLING if name in fields}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if "logit_bias" in given:
        given["logit_bias"] = {_token_id(key): bias for key, bias in given["logit_bias"].items()}
    return given


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ApiError(f"logit_bias has the key {key[:40]!r}, expected token ids", param="logit_bias")
    return int(key)


def read_stop(fields: Mapping[str, Any], name: str = "stop") -> tuple[str, ...]:
    """Stop strings, one or several."""
    stop = fields.get(name, ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def read_ending(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `lfm_mlx.server.asking.Ask` that `ENDING` gives."""
    return {"guards_loops": fields.get("loop_guard", True), "ignores_eos": fields.get("ignore_eos", False)}


def read_max_tokens(fields: Mapping[str, Any], *names: str) -> int | None:
    """The most tokens, by any of several names.

    Raises:
        ApiError: two names have different values.
    """
    given = {name: fields[name] for name in names if name in fields}
    if len(set(given.values())) > 1:
        listed = " and ".join(f"{name} {value}" for name, value in given.items())
        raise ApiError(f"{listed} were given, expected one limit; leave one out", param=next(iter(given)))
    return next(iter(given.values()), None)


def read_format(fields: Mapping[str, Any]) -> Constraint | None:
    """What an answer must be, from response_format or vLLM's guided_ fields.

    Raises:
        ApiError: more than one is given, or one cannot be enforced.
    """
    given = [name for name in ("response_format", *GUIDED) if name in fields]
    if len(given) > 1:
        raise ApiError(f"{' and '.join(given)} were given, expected one of them; leave one out", param=given[1])
    if not given:
        return None
    name = given[0]
    value = fields[name]
    if name == "response_format":
        name = f"response_format.{value['type']}"
        value = value.get(value["type"])
    return make_constraint(
        name.rpartition("_")[2] if name.startswith("guided_") else name.partition(".")[2], value, name
    )


def make_constraint(kind: str, value: Any, place: str) -> Constraint | None:
    """The constraint of a format's name and its value.

    Raises:
        ApiError: it cannot be enforced.
    """
    try:
        if kind in ("json_schema", "json"):
            return JsonSchema(value["schema"] if kind == "json_schema" else value)
        if kind == "json_object":
            return JsonObject()
        if kind == "regex":
            return Regex(value)
        if kind == "choice":
            return Choice(value)
        return Lark(value) if kind == "grammar" else None
    except OptionError as error:
        raise ApiError(f"{place}: {error}", param=place, code="invalid_value") from error


def check_stream(fields: Mapping[str, Any]) -> None:
    """Refuse options of a stream where there is none.

    Raises:
        ApiError: they were given.
    """
    if "stream_options" in fields and not fields.get("stream"):
        raise ApiError("stream_options was given without stream, expected both; leave it out", param="stream_options")
