from typing import Any

import pytest

from lfm_mlx.errors import OptionError
from lfm_mlx.parsing import parse_output, tool_schemas
from lfm_mlx.parsing.literals import Problem
from lfm_mlx.parsing.schemas import checked_arguments


def check(schema: dict[str, Any], value: Any) -> Any:
    """The value as an argument of this schema, or the code of the error."""
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": {"Int": {"type": "integer"}}}
    result = checked_arguments("f", [], {"a": value}, tool_schemas([{"name": "f", "parameters": parameters}]))
    return result.code if isinstance(result, Problem) else result["a"]


SCHEMAS: list[tuple[dict[str, Any], Any, Any]] = [
    ({}, "3", "3"),
    ({"type": "integer"}, "3", 3),
    ({"type": "integer"}, "-3", -3),
    ({"type": "integer"}, " 3", "wrong_type"),
    ({"type": "integer"}, "3.0", "wrong_type"),
    ({"type": "integer"}, "1e3", "wrong_type"),
    ({"type": "integer"}, "٣", "wrong_type"),
    ({"type": "integer"}, 2.0, 2),
    ({"type": "integer"}, 2.5, "wrong_type"),
    ({"type": "integer"}, True, "wrong_type"),
    ({"type": "number"}, "3", 3),
    ({"type": "number"}, "3.5", 3.5),
    ({"type": "number"}, 3, 3),
    ({"type": "number"}, "1e999", "wrong_type"),
    ({"type": "number"}, "nan", "wrong_type"),
    ({"type": "boolean"}, "true", True),
    ({"type": "boolean"}, "False", False),
    ({"type": "boolean"}, "yes", "wrong_type"),
    ({"type": "boolean"}, 1, "wrong_type"),
    ({"type": "string"}, "3", "3"),
    ({"type": "string"}, 3, "wrong_type"),
    ({"type": "null"}, None, None),
    ({"type": ["integer", "null"]}, "3", 3),
    ({"type": ["integer", "null"]}, None, None),
    ({"type": ["integer", "string"]}, "3", "3"),
    ({"type": "integer", "nullable": True}, None, None),
    ({"type": "array", "items": {"type": "integer"}}, [1, "2"], [1, 2]),
    ({"type": "array", "items": {"type": "integer"}}, [1, "x"], "wrong_type"),
    ({"type": "array"}, "[1]", "wrong_type"),
    ({"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, ["1", "2"], ["1", 2]),
    ({"type": "object", "properties": {"b": {"type": "integer"}}}, {"b": "1", "c": 2}, {"b": 1, "c": 2}),
    ({"type": "object", "required": ["b"]}, {}, "missing_argument"),
    ({"type": "object", "additionalProperties": False}, {"b": 1}, "unknown_argument"),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"b": "1"}, {"b": 1}),
    ({"enum": ["a", 1]}, 1, 1),
    ({"enum": [1]}, True, "not_in_enum"),
    ({"type": "integer", "enum": [1, 2]}, "2", 2),
    ({"const": "x"}, "y", "not_in_enum"),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", 3),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3", "3"),
    ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "x", "wrong_type"),
    ({"allOf": [{"type": "integer"}, {"enum": [3]}]}, "3", 3),
    ({"$ref": "#/$defs/Int"}, "3", 3),
    ({"$ref": "#/$defs/Int", "enum": [4]}, "3", "not_in_enum"),
    ({"$ref": "#/$defs/None"}, "3", "3"),
    ({"$ref": "other.json"}, "3", "3"),
    ({"$ref": "#/properties/a"}, "3", "3"),
    ({"type": "strange"}, "3", "3"),
]


@pytest.mark.parametrize(("schema", "value", "expected"), SCHEMAS)
def test_value_is_checked(schema: dict[str, Any], value: Any, expected: Any) -> None:
    assert repr(check(schema, value)) == repr(expected)


PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
        {"function": {"name": "f", "parameters": PARAMETERS}},
        {"type": "function", "name": "f", "parameters": PARAMETERS},
        {"name": "f", "parameters": PARAMETERS},
        {"name": "f", "inputSchema": PARAMETERS},
    ],
)
def test_every_form_of_a_tool_is_understood(tool: dict[str, Any]) -> None:
    (call,) = parse_output("<|tool_call_start|>[f(a='3')]<|tool_call_end|>", [tool]).tool_calls
    assert call.arguments == {"a": 3}


@pytest.mark.parametrize(
    ("parameters", "arguments", "expected"),
    [
        (None, {"a": 1}, {"a": 1}),
        ({}, {"a": 1}, {"a": 1}),
        ({"type": "object"}, {"a": 1}, {"a": 1}),
        ({"type": "object", "properties": {}}, {"a": 1}, "unknown_argument"),
        ({"type": "object", "properties": {}, "additionalProperties": True}, {"a": 1}, {"a": 1}),
        ({"type": "object", "properties": {}, "required": ["a"]}, {"a": 1}, {"a": 1}),
        ({"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}, {"a": "1"}, {"a": 1}),
        ({**PARAMETERS, "required": ["a"]}, {}, "missing_argument"),
    ],
)
def test_names_of_arguments_are_checked(parameters: Any, arguments: dict[str, Any], expected: Any) -> None:
    result = checked_arguments("f", [], arguments, tool_schemas([{"name": "f", "parameters": parameters}]))
    assert (result.code if isinstance(result, Problem) else result) == expected


def test_error_names_what_was_expected() -> None:
    parsed = parse_output("<|tool_call_start|>[get_wether(a=1)]<|tool_call_end|>", [{"name": "get_weather"}])
    (error,) = parsed.errors
    assert (error.code, error.name, error.arguments) == ("unknown_function", "get_wether", {"a": 1})
    assert "get_weather" in error.message
    assert "get_wether(a=1)" in parsed.content


@pytest.mark.parametrize(
    "tools", [[{}], [{"name": ""}], [{"name": "f"}, {"name": "f"}], [{"name": "f", "parameters": 1}], ["f"]]
)
def test_tool_that_is_none_is_refused(tools: list[Any]) -> None:
    with pytest.raises(OptionError, match="tool"):
        parse_output("x", tools)
