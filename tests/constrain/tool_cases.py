"""Tools as servers declare them, one for each feature of the schemas that occur."""

from __future__ import annotations

from typing import Any


def function(name: str, properties: dict[str, Any], required: list[str] | None = None, **rest: Any) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    parameters = {"type": "object", "properties": properties, "required": required or [], **rest}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


WEATHER = function("get_weather", {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["city"])
EVENT: dict[str, Any] = {
    "name": "calendar.create_event",
    "description": "A bare function object.",
    "parameters": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": 20, "description": "Title"},
            "days": {"type": "integer", "minimum": 1, "maximum": 31},
            "all_day": {"type": "boolean", "default": False},
            "people": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
            "meta": {
                "type": "object",
                "properties": {"priority": {"enum": ["low", "high", 3, None, True]}, "flag": {"type": "boolean"}},
                "required": ["flag"],
            },
        },
        "required": ["days", "meta"],
    },
}
MCP: dict[str, Any] = {"name": "now", "inputSchema": {"type": "object"}}
NUMBERS = function(
    "numbers",
    {
        "i": {"type": "integer"},
        "n": {"type": "number"},
        "ratio": {"type": "number", "minimum": 0, "maximum": 1},
        "even": {"type": "integer", "multipleOf": 2},
        "big": {"type": "integer", "exclusiveMinimum": 10},
        "code": {"const": 7},
        "port": {"type": "integer", "minimum": 0, "maximum": 65535, "format": "int32"},
    },
)
UNIONS = function(
    "unions",
    {
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}}, {"type": "null"}]},
        "one": {"oneOf": [{"type": "string"}, {"type": "boolean"}]},
        "both": {"allOf": [{"type": "string"}, {"minLength": 2}]},
        "word": {"type": "string", "pattern": "^[a-z]+'?\"?$"},
        "day": {"type": "string", "format": "date"},
        "mixed": {"allOf": [{"type": ["string", "boolean", "null", "integer"]}, {"minimum": 3}]},
    },
    ["one", "mixed"],
)
TREE = function(
    "tree",
    {
        "node": {"$ref": "#/$defs/node"},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
        "pair": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "items": False,
            "minItems": 1,
        },
        "open": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "additionalProperties": {"type": "string"},
        },
    },
    ["node"],
    **{
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": ["integer", "boolean", "null"]},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
            }
        }
    },
)
ANYTHING = function(
    "anything", {"value": {}, "items": {"type": "array"}, "data": {"const": {"a": [1, None, "x'\""]}}}, ["value"]
)
OPTIONAL = function("optional", {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in "abcd"})

TOOLS = [WEATHER, EVENT, MCP, NUMBERS, UNIONS, TREE, ANYTHING, OPTIONAL]


def parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments."""
    declared = tool.get("function", tool)
    schema: dict[str, Any] = declared.get("parameters") or declared["inputSchema"]
    return schema


def name(tool: dict[str, Any]) -> str:
    """A tool's name."""
    return str(tool.get("function", tool)["name"])
