"""Constrained answers of the trained tiny model at a temperature at which it writes nonsense when it is left alone."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lfm_mlx import load, parse_output
from lfm_mlx.chat import AnswerOptions, render_prompt
from lfm_mlx.chat.answer import make_control
from lfm_mlx.constrain import Constraint, JsonSchema, Regex, ToolCalls
from lfm_mlx.engine import Engine, Request, Row
from lfm_mlx.engine.control import Control
from lfm_mlx.load import Loaded
from lfm_mlx.types import SamplingParams

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
COUNT = int(os.environ.get("LFM_MLX_CONSTRAINED_COUNT", "8"))
"""Answers for each kind of constraint; a release is measured with 500."""

MAX_TOKENS = 120
ROWS = 32

pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="examples/tiny has no weights")

SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 24},
            "temperature": {"type": "integer", "minimum": -50, "maximum": 60},
            "sky": {"enum": ["sunny", "cloudy", "rainy", None]},
            "is_windy": {"type": "boolean"},
        },
        "required": ["city", "temperature", "is_windy"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "people": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
                        "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 120}, {"type": "null"}]},
                        "born": {"type": "string", "format": "date"},
                    },
                    "required": ["name", "age"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["people"],
        "additionalProperties": False,
    },
    # Nothing bounds this text: some answers reach max_tokens.
    {
        "type": "object",
        "properties": {"summary": {"type": "string"}, "score": {"type": "number"}},
        "required": ["score"],
    },
)
PATTERNS = (
    r"[A-Z][a-z]{2,11}, \d{1,2}/\d{1,2}/\d{4}",
    r"(yes|no|maybe)( because [a-z]+( [a-z]+){0,5})?\.",
    r"#[0-9a-f]{6}|rgb\(\d{1,3}, \d{1,3}, \d{1,3}\)",
    r'"[^"\\\n]*"',
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 30},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "send_message",
            "description": "Send a message to somebody.",
            "parameters": {
                "type": "object",
                "properties": {
                    "to": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
                    "text": {"type": "string"},
                    "options": {
                        "type": "object",
                        "properties": {"is_urgent": {"type": "boolean"}, "delay": {"type": ["number", "null"]}},
                        "additionalProperties": False,
                    },
                },
                "required": ["to", "text"],
                "additionalProperties": False,
            },
        },
    },
)
QUESTIONS = ("What's the weather in Paris?", "Tell Bob that I am late.", "Who is Ada? She was born in 1815.")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A constraint, and the test of a finished answer's text: it raises where the answer is wrong."""

    constraint: Constraint
    check: Callable[[str], None]


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load(TINY)


def json_case(schema: dict[str, Any]) -> Case:
    def check(text: str) -> None:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())

    return Case(constraint=JsonSchema(schema), check=check)


def regex_case(pattern: str) -> Case:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text, re.ASCII), text

    return Case(constraint=Regex(pattern), check=check)


def tools_case(tool_choice: str, *, is_parallel: bool) -> Case:
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}

    def check(text: str) -> None:
        output = parse_output(text, TOOLS)
        assert output.content.strip() == "", text
        assert not output.errors, text
        assert len(output.tool_calls) >= 1, text
        assert is_parallel or len(output.tool_calls) == 1, text
        for call in output.tool_calls:
            assert tool_choice in ("required", call.name)
            jsonschema.validate(call.arguments, parameters[call.name])

    return Case(constraint=ToolCalls(TOOLS, tool_choice=tool_choice, is_parallel=is_parallel), check=check)


CASES = {
    "schema": [json_case(schema) for schema in SCHEMAS],
    "regex": [regex_case(pattern) for pattern in PATTERNS],
    "tools": [
        tools_case("required", is_parallel=True),
        tools_case("required", is_parallel=False),
        tools_case("send_message", is_parallel=True),
    ],
}


def request(tiny: Loaded, case: Case, number: int, *, is_constrained: bool = True) -> Request:
    """Every second answer thinks first, for as long as its budget lets it."""
    message = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}
    prompt = render_prompt(tiny.tokenizer, [message], enable_thinking=number % 2 == 0)
    options = AnswerOptions(
        constraint=case.constraint if is_constrained else None, thinking_budget=12, guards_loops=False
    )
    return Request(
        prompt=prompt.ids,
        sampling=SamplingParams(temperature=1.5, seed=number),
        max_tokens=MAX_TOKENS,
        stop_ids=tiny.tokenizer.stop_ids,
        control=make_control(tiny.model, tiny.tokenizer, prompt, options),
    )


def run(tiny: Loaded, requests: Sequence[Request]) -> list[Row]:
    engine = Engine(tiny.model, max_rows=ROWS)
    rows = [engine.submit(one) for one in requests]
    while not engine.is_idle:
        engine.step()
    return rows


def answer_text(tiny: Loaded, row: Row) -> str:
    """What was written after the reasoning."""
    ids = [token_id for token_id in row.generated if token_id not in tiny.tokenizer.stop_ids]
    return tiny.tokenizer.decode(ids).rpartition("</think>")[2]


@pytest.mark.parametrize("kind", CASES)
def test_every_constrained_answer_is_valid_or_reported_as_cut(tiny: Loaded, kind: str) -> None:
    cases = list(itertools.islice(itertools.cycle(CASES[kind]), COUNT))
    rows = run(tiny, [request(tiny, case, number) for number, case in enumerate(cases)])
    num_whole = 0
    for case, row in zip(cases, rows, strict=True):
        control = row.request.control
        assert isinstance(control, Control)
        assert row.finish_reason == ("length" if control.is_cut else "stop")
        if control.is_cut:
            assert len(row.generated) == MAX_TOKENS
        else:
            case.check(answer_text(tiny, row).lstrip("\n") if kind != "regex" else answer_text(tiny, row))
            num_whole += 1
    print(f"{kind}: {num_whole} whole and valid, {COUNT - num_whole} cut by max_tokens, of {COUNT}")
    assert num_whole >= COUNT // 2


@pytest.mark.parametrize("kind", CASES)
def test_without_the_constraint_they_are_not(tiny: Loaded, kind: str) -> None:
    cases = list(itertools.islice(itertools.cycle(CASES[kind]), 8))
    rows = run(tiny, [request(tiny, case, number, is_constrained=False) for number, case in enumerate(cases)])
    num_wrong = 0
    for case, row in zip(cases, rows, strict=True):
        try:
            case.check(answer_text(tiny, row))
        except (AssertionError, ValueError, jsonschema.ValidationError):
            num_wrong += 1
    assert num_wrong >= 4
