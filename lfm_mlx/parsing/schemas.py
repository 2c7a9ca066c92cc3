"""Arguments checked against the tools' JSON schemas, and coerced where the text has one reading.

Checked are what a wrong call differs in: known names, required arguments, types, enum and const, properties and items,
through `$ref`, `anyOf`, `oneOf`, `allOf` and lists of types. Ranges, patterns and formats are left to the tool.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.literals import Problem
from lfm_mlx.types import Tool

_MAX_DEPTH: Final = 100
_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,300})")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_BOOLEANS: Final = {"true": True, "True": True, "false": False, "False": False}
_ANY: Final[Mapping[str, Any]] = {}


class ToolSchema(NamedTuple):
    """What a tool takes: a JSON schema of an object, None if the tool does not say."""

    name: str
    parameters: Mapping[str, Any] | None


def tool_schemas(tools: Iterable[Tool]) -> dict[str, ToolSchema]:
    """The tools by name, from OpenAI's form, a bare function object or MCP's (`inputSchema`).

    Raises:
        OptionError: a tool has no name, two have the same, or its parameters are no schema.
    """
    schemas: dict[str, ToolSchema] = {}
    for tool in tools:
        inner = tool.get("function") if isinstance(tool, Mapping) else None
        function = inner if isinstance(inner, Mapping) else tool
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise OptionError(f"tools holds {str(tool)[:100]}, expected a function object with a name")
        if name in schemas:
            raise OptionError(f"tools holds {name!r} twice, expected distinct names")
        keys = ("parameters", "inputSchema", "input_schema")
        parameters = next((function[key] for key in keys if function.get(key) is not None), None)
        if parameters is not None and not isinstance(parameters, Mapping):
            raise OptionError(f"the parameters of tool {name!r} are {str(parameters)[:100]}, expected a JSON schema")
        schemas[name] = ToolSchema(name, parameters)
    return schemas


def checked_arguments(
    name: str, values: Sequence[Any], arguments: Mapping[str, Any], schemas: Mapping[str, ToolSchema] | None
) -> dict[str, Any] | Problem:
    """The arguments of a call as its tool expects them.

    Args:
        name: the function.
        values: the arguments without a name, matched to the schema's properties in order.
        arguments: the arguments with a name.
        schemas: from `tool_schemas`; None when the tools are not known, and nothing can be checked.
    """
    if schemas is None:
        return Problem("positional", _UNNAMED) if values else dict(arguments)
    tool = schemas.get(name)
    if tool is None:
        known = ", ".join(sorted(schemas)[:20]) or "none"
        near = difflib.get_close_matches(name[:200], schemas, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {known}"
        return Problem("unknown_function", f"there is no function {name[:200]!r}; {hint}")
    if tool.parameters is None:
        return Problem("positional", _UNNAMED) if values else dict(arguments)
    return _Checker(tool.parameters).call(values, arguments)


_UNNAMED: Final = "a value without a name cannot be matched to an argument, expected name=value"


class _Checker:
    """Checks values against one schema; `root` is where `$ref` points into."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def call(self, values: Sequence[Any], arguments: Mapping[str, Any]) -> dict[str, Any] | Problem:
        schema = self._resolved(self._root)
        properties = _mapping(schema.get("properties"))
        if values:
            matched = _named(values, arguments, list(properties))
            if isinstance(matched, Problem):
                return matched
            arguments = matched
        allows_more = schema.get("additionalProperties", "properties" not in schema) is not False
        allows_more |= any(key in schema for key in ("patternProperties", "allOf", "anyOf", "oneOf"))
        required = _strings(schema.get("required"))
        for key in arguments:
            if key not in properties and key not in required and not allows_more:
                expected = ", ".join(properties) or "none"
                return Problem("unknown_argument", f"there is no argument {key[:200]!r}; known: {expected[:500]}")
        missing = [key for key in required if key not in arguments]
        if missing:
            return Problem("missing_argument", f"the argument {missing[0]!r} is missing")
        checked: dict[str, Any] | Problem = self._value(dict(arguments), schema, "", 0)
        return checked

    def _value(self, value: Any, schema: object, path: str, depth: int) -> Any:
        """The value as `schema` wants it, or a Problem."""
        if schema is True or depth > _MAX_DEPTH:
            return value
        if not isinstance(schema, Mapping):
            return Problem("wrong_type", f"{path or 'a value'} is not allowed") if schema is False else value
        schema = self._resolved(schema)
        value = _typed(value, schema, path)
        for part in _schemas(schema.get("allOf")):
            if not isinstance(value, Problem):
                value = self._value(value, part, path, depth + 1)
        for key in ("anyOf", "oneOf"):
            branches = _schemas(schema.get(key))
            if branches and not isinstance(value, Problem):
                value = self._branch(value, branches, path, depth + 1)
        if isinstance(value, Problem):
            return value
        allowed = schema.get("enum") if "enum" in schema else [schema["const"]] if "const" in schema else None
        if isinstance(allowed, Sequence) and not any(_is_same(value, entry) for entry in allowed):
            return Problem("not_in_enum", f"{path} is {_short(value)}, expected one of {_short(list(allowed))}")
        if isinstance(value, dict):
            return self._object(value, schema, path, depth)
        if isinstance(value, list):
            return self._array(value, schema, path, depth)
        return value

    def _branch(self, value: Any, branches: Sequence[object], path: str, depth: int) -> Any:
        """The value as it is if a branch takes it so, else the one result of coercion."""
        results = [self._value(value, branch, path, depth) for branch in branches]
        taken = [result for result in results if not isinstance(result, Problem)]
        if any(_is_same(result, value) for result in taken):
            return value
        if taken and all(_is_same(result, taken[0]) for result in taken):
            return taken[0]
        if taken:
            return Problem("wrong_type", f"{path} is {_short(value)}, which can be read in several ways")
        return results[0] if len(results) == 1 else Problem("wrong_type", f"{path} is {_short(value)}, of no such type")

    def _object(self, value: dict[str, Any], schema: Mapping[str, Any], path: str, depth: int) -> Any:
        properties = _mapping(schema.get("properties"))
        more = schema.get("additionalProperties", True)
        checked = {}
        for key in _strings(schema.get("required")):
            if key not in value:
                return Problem("missing_argument", f"{_inside(path, key)} is missing")
        for key, entry in value.items():
            if key not in properties and more is False and "patternProperties" not in schema:
                return Problem("unknown_argument", f"{_inside(path, key)} is not known")
            result = self._value(entry, properties.get(key, more), _inside(path, key), depth + 1)
            if isinstance(result, Problem):
                return result
            checked[key] = result
        return checked

    def _array(self, value: list[Any], schema: Mapping[str, Any], path: str, depth: int) -> Any:
        first = _schemas(schema.get("prefixItems"))
        rest = schema.get("items", True)
        checked = []
        for index, entry in enumerate(value):
            result = self._value(entry, first[index] if index < len(first) else rest, f"{path}[{index}]", depth + 1)
            if isinstance(result, Problem):
                return result
            checked.append(result)
        return checked

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema that `$ref` names; one that cannot be found allows everything."""
        for _ in range(_MAX_DEPTH):
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            found: object = self._root
            for part in reference.split("/")[1:] if reference.startswith("#") else [None]:
                key = "" if part is None else part.replace("~1", "/").replace("~0", "~")
                found = found.get(key) if isinstance(found, Mapping) and part is not None else None
            if not isinstance(found, Mapping):
                return _ANY
            schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
        return _ANY


def _named(values: Sequence[Any], arguments: Mapping[str, Any], names: list[str]) -> dict[str, Any] | Problem:
    """Values without a name take the schema's names in order."""
    if len(values) > len(names):
        return Problem("positional", f"{len(values)} values have no name, expected at most {len(names)}")
    matched = dict(zip(names, values, strict=False))
    twice = [name for name in matched if name in arguments]
    if twice:
        return Problem("positional", f"the argument {twice[0]!r} is given with and without its name")
    return {**matched, **arguments}


def _typed(value: Any, schema: Mapping[str, Any], path: str) -> Any:
    """The value if it is of the schema's type, or the one coercion that makes it so."""
    declared = schema.get("type")
    types = [declared] if isinstance(declared, str) else _strings(declared)
    if schema.get("nullable") is True:
        types = [*types, "null"] if types else types
    if not types or any(_is_type(value, name) for name in types):
        is_whole = isinstance(value, float) and "integer" in types and "number" not in types and value.is_integer()
        return int(value) if is_whole else value
    if isinstance(value, str):
        readings = [reading for name in types if (reading := _coerced(value, name)) is not None]
        if readings and all(reading == readings[0] for reading in readings):
            return readings[0]
    return Problem("wrong_type", f"{path} is {_short(value)}, expected {' or '.join(types)}")


def _is_type(value: Any, name: str) -> bool:
    if name == "integer":
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return is_whole and not isinstance(value, bool)
    if name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, kinds[name]) if name in kinds else True


def _coerced(text: str, name: str) -> Any:
    """What a string says as an integer, number or boolean; None if it does not say one."""
    if name == "boolean":
        return _BOOLEANS.get(text)
    if name in ("integer", "number") and _INTEGER.fullmatch(text):
        return int(text)
    if name == "number" and _NUMBER.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else None
    return None


def _is_same(left: Any, right: Any) -> bool:
    """Equality of JSON values: true is not 1, 1.0 is 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_is_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_same(left[key], right[key]) for key in left)
    return bool(left == right)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _strings(value: object) -> list[str]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return [entry for entry in value if isinstance(entry, str)] if is_list else []  # type: ignore[attr-defined]


def _schemas(value: object) -> list[object]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def _inside(path: str, key: str) -> str:
    return f"{path}.{key[:80]}" if path else key[:80]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
