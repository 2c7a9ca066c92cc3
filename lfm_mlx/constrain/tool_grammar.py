"""Tools to a grammar of exactly the well-formed calls of these tools, in the Pythonic or the JSON form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_mlx.constrain.lark_rules import LarkRules, either, quoted
from lfm_mlx.constrain.literal_grammar import (
    COMMA,
    SEPARATORS,
    Form,
    LiteralGrammar,
    property_schemas,
    sequence,
    spell_string,
)
from lfm_mlx.constrain.schema_check import ANNOTATIONS, check_schema, resolve
from lfm_mlx.errors import OptionError
from lfm_mlx.types import Tool

_FUNCTION_NAME = re.compile(r"\w[\w.\-/]*")
_PARAMETER_NAME = re.compile(r"[^\W\d]\w*")
_PARAMETER_KEYS = frozenset(
    ("type", "properties", "required", "additionalProperties", "minProperties", "maxProperties", "$defs", "definitions")
)


@dataclass(frozen=True, kw_only=True)
class ToolDeclaration:
    """What a tool's dict says, whichever of the known forms it has.

    Args:
        name: the function's name.
        parameters: JSON schema of the arguments, an object.
    """

    name: str
    parameters: Mapping[str, Any]


def read_tools(tools: Sequence[Tool]) -> tuple[ToolDeclaration, ...]:
    """The declarations of tools in OpenAI's form, as bare function objects, or in MCP's form (`inputSchema`).

    Raises:
        OptionError: a tool has no name, a name stands twice, or the parameters are no schema of an object.
    """
    declarations = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [one.name for one in declarations]
    for name, count in Counter(names).items():
        if count > 1:
            raise OptionError(f"tools: the name {name!r} stands {count} times, expected once; rename one")
    return declarations


def calls_grammar(tools: Sequence[ToolDeclaration], *, form: Form, is_parallel: bool) -> str:
    """The rules in Lark for `calls`, the list of calls between the markers.

    Args:
        tools: at least one.
        form: Pythonic `[f(a=1)]` or JSON `[{"name": "f", "arguments": {"a": 1}}]`.
        is_parallel: whether the list may hold more than one call.

    Raises:
        OptionError: a schema asks for what cannot be enforced.
    """
    rules = LarkRules()
    write = _pythonic_call if form == "pythonic" else _json_call
    call = rules.rule(either(rules.rule(write(rules, tool)) for tool in tools))
    more = f"({COMMA} {call})*" if is_parallel else ""
    calls = rules.text("calls", f'"[" {call} {more} "]"')
    return f"{calls}\n{SEPARATORS}"


def _pythonic_call(rules: LarkRules, tool: ToolDeclaration) -> str:
    place = f"tool {tool.name!r}"
    if not _FUNCTION_NAME.fullmatch(tool.name):
        raise OptionError(f"{place}: the Pythonic form needs a name of letters, digits and _ . - / ; use form='json'")
    literals, schema = _arguments(rules, tool, "pythonic")
    required = set(schema.get("required", ()))
    pairs = []
    for name, value_schema in property_schemas(schema).items():
        if not _PARAMETER_NAME.fullmatch(name):
            raise OptionError(f"{place}: the parameter {name!r} cannot be written as name=value; use form='json'")
        if value_schema is not False or name in required:
            pairs.append((f"{quoted(name + '=')} {literals.value(value_schema, is_inner=False)}", name in required))
    return f'{quoted(tool.name + "(")} {sequence(rules, pairs)} ")"'


def _json_call(rules: LarkRules, tool: ToolDeclaration) -> str:
    literals, schema = _arguments(rules, tool, "json")
    plain = {key: value for key, value in schema.items() if key in _PARAMETER_KEYS and "Properties" not in key}
    arguments = literals.value({**plain, "type": "object", "additionalProperties": False})
    # One piece, spaced as json.dumps does it: less to compile, more to fast-forward.
    head = f'{{"name": {spell_string(tool.name, chr(34))}, "arguments": '
    return f'{quoted(head)} {arguments} "}}"'


def _arguments(rules: LarkRules, tool: ToolDeclaration, form: Form) -> tuple[LiteralGrammar, Mapping[str, Any]]:
    """The writer of a tool's values, and the object schema of its arguments with references followed."""
    place = f"tool {tool.name!r}: parameters"
    check_schema(tool.parameters, place)
    schema: Any = tool.parameters
    while isinstance(schema, Mapping) and "$ref" in schema:
        schema = resolve(schema["$ref"], tool.parameters)
    if not isinstance(schema, Mapping) or schema.get("type", "object") not in ("object", ["object"]):
        raise OptionError(f"{place} are not an object's schema, expected type 'object' with properties")
    for key in schema:
        if key not in _PARAMETER_KEYS and key not in ANNOTATIONS and not key.startswith("x-"):
            raise OptionError(f"{place}#/{key}: the keyword {key!r} is not supported here; say it within properties")
    count = len(property_schemas(schema))
    num_required = len(set(schema.get("required", ())))
    if schema.get("minProperties", 0) > num_required or schema.get("maxProperties", count) < count:
        key = "minProperties" if schema.get("minProperties", 0) > num_required else "maxProperties"
        raise OptionError(f"{place}#/{key}: the keyword {key!r} is not supported here; use required")
    return LiteralGrammar(rules, tool.parameters, form, place), schema


def _read_tool(tool: Tool, place: str) -> ToolDeclaration:
    if not isinstance(tool, Mapping):
        raise OptionError(f"{place} is {tool!r:.60}, expected a dict with a name and parameters")
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise OptionError(f"{place} has no name, expected a dict like {{'name': 'f', 'parameters': {{...}}}}")
    keys = ("parameters", "inputSchema", "input_schema")
    parameters: Any = next((function[key] for key in keys if function.get(key) is not None), {})
    if not isinstance(parameters, Mapping):
        raise OptionError(f"{place}: parameters is {parameters!r:.60}, expected a JSON schema with type 'object'")
    return ToolDeclaration(name=name, parameters=parameters)
