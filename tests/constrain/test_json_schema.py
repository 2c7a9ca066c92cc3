from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from drawing import accepts_text, answers
from schema_cases import CASES, REFUSED

from lfm_mlx.constrain import GrammarTokenizer, JsonObject, JsonSchema, ToolCalls
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer

# What jsonschema cannot judge without further packages, or judges by an older rule.
JUDGED_HERE = {
    ("date-time", "2023-01-01T25:00:00Z"): False,
    ("date-time", "2023-01-01"): False,
    ("time", "10:00:00Z"): True,
    ("time", "25:00:00Z"): False,
    ("time", "10:00"): False,
    ("email", "@"): False,
}


def is_valid(schema: Any, instance: Any) -> bool:
    if isinstance(schema, dict) and isinstance(instance, str) and (schema.get("format"), instance) in JUDGED_HERE:
        return JUDGED_HERE[schema["format"], instance]
    checker = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "email", "uuid"])
    return bool(jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(instance))


@pytest.mark.parametrize(("schema", "instances"), CASES, ids=[json.dumps(schema)[:70] for schema, _ in CASES])
def test_exactly_the_valid_instances_are_accepted(
    schema: Any, instances: list[Any], vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    constraint = JsonSchema(schema, reasoning="forbidden")
    for instance in instances:
        text = json.dumps(instance, ensure_ascii=False)
        assert accepts_text(constraint, vocabulary, tokenizer, text) == is_valid(schema, instance), text


OF_ARGUMENTS = [(schema, instances) for schema, instances in CASES if "$ref" not in json.dumps(schema)]


@pytest.mark.parametrize(("schema", "instances"), OF_ARGUMENTS, ids=[json.dumps(one)[:70] for one, _ in OF_ARGUMENTS])
def test_no_argument_of_a_tool_is_invalid(
    schema: Any, instances: list[Any], vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    """The writer for calls is another one; keys that are not named are not offered there."""
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    tools = [{"name": "f", "parameters": parameters}]
    constraint = ToolCalls(tools, tool_choice="required", reasoning="forbidden", form="json")
    for instance in instances:
        arguments = json.dumps({"x": instance}, ensure_ascii=False)
        text = f'<|tool_call_start|>[{{"name": "f", "arguments": {arguments}}}]<|tool_call_end|>'
        is_open = (
            isinstance(schema, dict) and isinstance(instance, dict) and instance.keys() - schema.get("properties", {})
        )
        is_accepted = accepts_text(constraint, vocabulary, tokenizer, text)
        assert is_accepted <= is_valid(schema, instance), text
        assert is_accepted or is_open or not is_valid(schema, instance), text


def test_the_table_has_valid_and_invalid_instances() -> None:
    verdicts = [is_valid(schema, instance) for schema, instances in CASES for instance in instances]
    assert sum(verdicts) > 100
    assert len(verdicts) - sum(verdicts) > 100


@pytest.mark.parametrize(("schema", "instances"), CASES, ids=[json.dumps(schema)[:70] for schema, _ in CASES])
def test_what_is_drawn_from_noise_is_valid(schema: Any, instances: list[Any], vocabulary: GrammarTokenizer) -> None:
    # An address or a rare letter at the right place is seldom hit upon by chance.
    is_rare = isinstance(schema, dict) and ("pattern" in schema or schema.get("format") == "email")
    share = 0 if is_rare else 0.5
    for answer in answers(JsonSchema(schema, reasoning="forbidden"), vocabulary, 12, max_tokens=160, share=share):
        assert is_valid(schema, json.loads(answer.text)), answer.text


@pytest.mark.parametrize(("schema", "expected"), REFUSED, ids=[str(schema)[:60] for schema, _ in REFUSED])
def test_what_cannot_be_enforced_is_refused_with_keyword_or_place(schema: Any, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        JsonSchema(schema)
    assert expected in str(caught.value)


def test_a_key_cannot_hide_behind_an_escape(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}, "type": "object"}
    constraint = JsonSchema(schema, reasoning="forbidden")
    assert accepts_text(constraint, vocabulary, tokenizer, '{"b": "x"}')
    assert not accepts_text(constraint, vocabulary, tokenizer, r'{"\u0061": "x"}')


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        ('{"a":1}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{\n  "a": {\n    "b": 1\n  }\n}', True),
        ('{"a":   1}', False),
        ('{"a": 1} ', False),
        ('{\n\n\n"a": 1}', False),
        ("[]", False),
        ('{"a": 1', False),
    ],
)
def test_white_space_is_what_printers_write_and_comes_to_an_end(
    text: str, is_accepted: bool, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    assert accepts_text(JsonObject(reasoning="forbidden"), vocabulary, tokenizer, text) is is_accepted


@pytest.mark.parametrize(
    "schema", [{"type": "integer"}, {"type": ["integer", "null"], "minimum": 5}, {"$ref": "#/$defs/a"}]
)
def test_an_integer_comes_to_an_end(schema: Any, vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    constraint = JsonSchema({"$defs": {"a": {"type": "integer"}}, **schema}, reasoning="forbidden")
    for digits, is_accepted in (("5", True), (str(2**62), True), ("4" * 20, False)):
        assert accepts_text(constraint, vocabulary, tokenizer, digits) is is_accepted


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(OptionError, match="nested more than 64 deep"):
        JsonSchema(schema)


@pytest.mark.parametrize("as_tool", [False, True])
def test_references_that_lead_too_deep_are_refused(as_tool: bool) -> None:
    """What compiles a schema calls itself at each of them: thousands overflow its stack, and end the process."""

    def nested(depth: int) -> dict[str, Any]:
        inner = {"type": "array", "items": {"type": "integer"}}
        chain = {f"a{n}": {"type": "array", "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(depth)}
        return {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": {**chain, f"a{depth}": inner}}

    def make(depth: int) -> object:
        schema = nested(depth)
        return ToolCalls([{"name": "f", "parameters": schema}]) if as_tool else JsonSchema(schema)

    assert make(50)
    with pytest.raises(OptionError, match="more than 128 levels deep"):
        make(1000)
