"""Tools to a grammar of exactly the well-formed calls of these tools, in the Pythonic or the JSON form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_mlx.constrain.lark_rules import Irregular, LarkRules, either, quoted
from lfm_mlx.constrain.literal_grammar import Form, LiteralGrammar, asked_text, property_schemas, spell_string
from lfm_mlx.constrain.members import COMMA, SEPARATORS, Member, sequence
from lfm_mlx.constrain.schema_check import ANNOTATIONS, check_keywords, json_text
from lfm_mlx.constrain.schema_tree import resolve
from lfm_mlx.errors import OptionError
from lfm_mlx.types import Tool

_FUNCTION_NAME = re.compile(r"\w[\w.\-/]*")
_PARAMETER_NAME = re.compile(r"[^\W\d]\w*")
_PARAMETER_KEYS = frozenset(
    ("type", "properties", "required", "additionalProperties", "minProperties", "maxProperties", "$defs", "definitions")
)
_KNOWN_KEYS = _PARAMETER_KEYS | ANNOTATIONS


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
    writer = _CallWriter(form)
    bodies = writer.bodies(tools)
    rules = writer.rules
    regular = [body for body, is_regular in bodies if is_regular]
    names = [rules.terminal(either(regular))] if regular else []
    rules.is_regular = False
    call = rules.rule(either([*names, *(rules.rule(body) for body, is_regular in bodies if not is_regular)]))
    more = f"({COMMA} {call})*" if is_parallel else ""
    calls = rules.text("calls", f'"["{call}{more}"]"')
    return f"{calls}\n{SEPARATORS}"


class _CallWriter:
    """Writes calls; what was checked and written for one tool serves the others."""

    def __init__(self, form: Form) -> None:
        self.rules = LarkRules()
        self._form = form
        self._checked: set[str] = set()

    def bodies(self, tools: Sequence[ToolDeclaration]) -> list[tuple[str, bool]]:
        """The body of each tool's calls, and whether it is one for a terminal."""
        try:
            has_references = _mentions_references(json_text([tool.parameters for tool in tools]))
        except OptionError:
            for tool in tools:
                json_text(tool.parameters, _place(tool))
            raise
        return [self._body(tool, has_references and _mentions_references(json_text(tool.parameters))) for tool in tools]

    def _body(self, tool: ToolDeclaration, has_references: bool) -> tuple[str, bool]:
        texts = {} if has_references else _property_texts(tool.parameters)
        schema = self._checked_arguments(tool, texts, has_references)
        literals = LiteralGrammar(self.rules, tool.parameters, self._form, _place(tool), has_references=has_references)
        self.rules.is_regular = True
        try:
            members = self._members(tool, literals, schema, texts)
        except Irregular:
            self.rules.is_regular = False
            members = self._members(tool, literals, schema, texts)
        return sequence(self.rules, self._head(tool), members, self._tail), self.rules.is_regular

    def _head(self, tool: ToolDeclaration) -> str:
        if self._form == "pythonic":
            return f'"{tool.name}("'
        # One piece, spaced as json.dumps does it: less to compile, more to fast-forward.
        return quoted(f'{{"name": {spell_string(tool.name, chr(34))}, "arguments": {{')

    @property
    def _tail(self) -> str:
        return '")"' if self._form == "pythonic" else '"}}"'

    def _members(
        self, tool: ToolDeclaration, literals: LiteralGrammar, schema: Mapping[str, Any], texts: Mapping[str, str]
    ) -> list[Member]:
        if self._form == "json":
            return literals.members(schema, texts)
        if not _FUNCTION_NAME.fullmatch(tool.name):
            raise OptionError(
                f"tool {tool.name!r}: the Pythonic form needs a name of letters, digits and _ . - / ; use form='json'"
            )
        required = schema.get("required", ())
        members = []
        for name, value_schema in property_schemas(schema).items():
            if not _PARAMETER_NAME.fullmatch(name):
                raise OptionError(
                    f"tool {tool.name!r}: the parameter {name!r} cannot be written as name=value; use form='json'"
                )
            if value_schema is not False or name in required:
                value = literals.value(value_schema, is_inner=False, text=texts.get(name))
                members.append((f'"{name}="{value}', name in required))
        return members

    def _checked_arguments(
        self, tool: ToolDeclaration, texts: Mapping[str, str], has_references: bool
    ) -> Mapping[str, Any]:
        """The object schema of a tool's arguments, references followed."""
        schema: Any = tool.parameters
        properties = schema.get("properties")
        if has_references or not isinstance(properties, dict):
            check_keywords(schema, _place(tool))
        else:
            check_keywords({**schema, "properties": self._new_properties(properties, texts)}, _place(tool))
        while isinstance(schema, Mapping) and "$ref" in schema:
            schema = resolve(schema["$ref"], tool.parameters)
        if not isinstance(schema, Mapping) or schema.get("type", "object") not in ("object", ["object"]):
            raise OptionError(f"{_place(tool)} are not an object's schema, expected type 'object' with properties")
        for key in schema:
            if key not in _KNOWN_KEYS and not key.startswith("x-"):
                raise OptionError(
                    f"{_place(tool)}#/{key}: the keyword {key!r} is not supported here; say it within properties"
                )
        if "minProperties" in schema or "maxProperties" in schema:
            _check_num_arguments(schema, _place(tool))
        return schema

    def _new_properties(self, properties: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
        """Those that no tool before had; descriptions do not count."""
        new = {}
        for name, schema in properties.items():
            text = texts.get(name)
            if text in self._checked:
                continue
            if text is not None:
                self._checked.add(text)
            new[name] = schema
        return new


def _property_texts(parameters: Mapping[str, Any]) -> dict[str, str]:
    """What each argument's schema asks for, as text; arguments that have none are left out."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: asked_text(schema) for name, schema in properties.items() if isinstance(schema, dict)}


def _check_num_arguments(schema: Mapping[str, Any], place: str) -> None:
    count = len(property_schemas(schema))
    num_required = len(set(schema.get("required", ())))
    if schema.get("minProperties", 0) > num_required or schema.get("maxProperties", count) < count:
        key = "minProperties" if schema.get("minProperties", 0) > num_required else "maxProperties"
        raise OptionError(f"{place}#/{key}: the keyword {key!r} is not supported here; use required")


def _mentions_references(text: str) -> bool:
    """Whether a schema may have or use definitions, by its JSON text."""
    return "$ref" in text or "$defs" in text or "definitions" in text


def _place(tool: ToolDeclaration) -> str:
    return f"tool {tool.name!r}: parameters"


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
