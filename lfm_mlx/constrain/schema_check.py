"""Refuses, by keyword and place, what a JSON schema asks for and no grammar here can enforce."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llguidance import LLMatcher

from lfm_mlx.constrain.reason import one_line
from lfm_mlx.constrain.schema_tree import (
    SCHEMA_KEYS,
    SCHEMA_LIST_KEYS,
    SCHEMA_MAP_KEYS,
    Schema,
    count_levels,
    escape_pointer,
    resolve,
    subschemas,
)
from lfm_mlx.constrain.string_formats import NATIVE, PATTERNS, with_format_pattern
from lfm_mlx.errors import OptionError

JSON_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
FORMATS = (*PATTERNS, *NATIVE)
MAX_CHARS = 250_000
EXACT = 2**53
"""llguidance computes with floats, which leave out whole numbers beyond."""

ANNOTATIONS = frozenset(
    (
        "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
        "$schema", "$id", "id", "$anchor", "nullable", "discriminator", "externalDocs", "xml", "strict",
        "contentEncoding", "contentMediaType", "contentSchema",
    )
)  # fmt: skip
"""Keywords that say nothing about which values are valid."""

UNSUPPORTED = frozenset(
    (
        "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
        "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
        "additionalItems", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary",
    )
)  # fmt: skip
"""Keywords of JSON Schema that a token grammar cannot enforce."""

LARGEST = 9 * 10**18
"""Near the end of 64 bits llguidance finds no end."""

_BARE_KEYS = ANNOTATIONS | {"type"}
_TO_JSON = json.JSONEncoder(allow_nan=False)

# For grammars: one spelling per string, so that a key cannot hide behind an escape; whitespace that comes to an end.
COMPILE_OPTIONS = {"json_allowed_escapes": 'nrbtf\\"', "whitespace_pattern": r" |\n( {0,32}|\t{0,8})"}


def check_schema(schema: object, name: str = "schema") -> None:
    """Raise OptionError unless every keyword of `schema` will be enforced or is an annotation.

    Args:
        schema: a JSON schema, draft 2020-12; older drafts where they mean the same.
        name: what the error calls it; keyword places follow as a JSON pointer, as in `schema#/properties/a/not`.
    """
    check_len(json_text(schema, name), name)
    check_keywords(schema, name)


def check_keywords(schema: object, name: str = "schema") -> None:
    """`check_schema` for what is known to be JSON."""
    has_references = False
    for pointer, subschema in subschemas(schema, name):
        if _is_bare_type(subschema):
            continue
        _check_values(subschema, f"{name}#{pointer}")
        has_references = has_references or (isinstance(subschema, Mapping) and "$ref" in subschema)
    if has_references:
        count_levels(schema, schema, name)
        for pointer, subschema in subschemas(schema, name):
            _check_reference(subschema, schema, f"{name}#{pointer}")


def _is_bare_type(schema: object) -> bool:
    """Whether `schema` says one known type and nothing else to be checked, as most do."""
    return isinstance(schema, dict) and schema.keys() <= _BARE_KEYS and schema.get("type") in JSON_TYPES


def check_compiles(schema: Schema, name: str = "schema") -> None:
    """Raise OptionError unless llguidance makes a grammar of `schema`, naming the innermost part that it refuses."""
    _check_numbers(schema, name)
    reason = _refusal(schema)
    if not reason:
        return
    definitions = {
        key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, Mapping) and key in schema
    }
    for pointer, subschema in reversed(list(subschemas(schema, name))):
        if isinstance(subschema, Mapping) and "$ref" not in subschema:
            inner_reason = _refusal({**definitions, **subschema})
            if inner_reason:
                raise OptionError(f"{name}#{pointer}: {inner_reason}; write this part of the schema in another way")
    raise OptionError(f"{name}: {reason}; write the schema in another way")


def check_len(text: str, name: str) -> None:
    """Refuse what would take seconds to compile, which grows with the square of its length.

    Raises:
        OptionError: with both lengths.
    """
    if len(text) > MAX_CHARS:
        raise OptionError(f"{name} has {len(text):,} characters, expected at most {MAX_CHARS:,}; shorten it")


def json_text(schema: object, name: str = "schema") -> str:
    """`schema` as JSON.

    Raises:
        OptionError: it holds what JSON has no form for.
    """
    try:
        return _TO_JSON.encode(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{name} is not JSON: {error}; give what json.loads returns") from error


def _check_values(schema: object, place: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise OptionError(f"{place} is {schema!r:.60}, expected a schema: an object, true or false")
    for keyword, value in schema.items():
        if keyword in UNSUPPORTED:
            raise OptionError(
                f"{place}/{keyword}: the keyword {keyword!r} is not supported, as no grammar can enforce it; "
                "remove it and check the finished answer"
            )
        if keyword in _VALUE_CHECKS:
            expected, is_valid = _VALUE_CHECKS[keyword]
            if not is_valid(value):
                raise OptionError(f"{place}/{keyword} is {value!r:.60}, expected {expected}")
        elif keyword not in ANNOTATIONS and (not keyword.startswith("x-") or keyword == "x-guidance"):
            raise OptionError(
                f"{place}/{escape_pointer(str(keyword))}: unknown keyword {keyword!r}{_nearest(keyword)}; remove it"
            )
    _check_format(schema, place)
    _check_num_properties(schema, place)


def _check_format(schema: Mapping[str, Any], place: str) -> None:
    """A format is about strings alone; where no string is possible it says nothing (`int32`)."""
    if "format" not in schema:
        return
    types = schema.get("type", "string")
    applies = "string" in ([types] if isinstance(types, str) else types)
    if applies and schema["format"] not in FORMATS:
        raise OptionError(
            f"{place}/format: the format {schema['format']!r} is not supported, expected one of "
            f"{', '.join(FORMATS)}; remove it or write a pattern"
        )


def _check_num_properties(schema: Mapping[str, Any], place: str) -> None:
    """Free keys may repeat, so they cannot be counted: two of them may be one property."""
    if "minProperties" not in schema:
        return
    minimum = schema["minProperties"]
    if minimum > max(1, len(set(schema.get("required", ())))):
        raise OptionError(
            f"{place}/minProperties is {minimum}: the keyword 'minProperties' is supported up to 1, or up to the "
            "number of required properties; name the properties under required"
        )


def _check_reference(schema: object, root: object, place: str) -> None:
    if not isinstance(schema, Mapping) or "$ref" not in schema:
        return
    seen = set()
    current: object = schema
    while isinstance(current, Mapping) and "$ref" in current:
        reference = current["$ref"]
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            raise OptionError(
                f"{place}/$ref is {reference!r}: only references within the schema are supported, expected one like "
                "'#/$defs/name'; copy what it points to into $defs"
            )
        if reference in seen:
            raise OptionError(f"{place}/$ref is {reference!r}, which points to itself; expected a schema there")
        seen.add(reference)
        try:
            current = resolve(reference, root)
        except LookupError:
            raise OptionError(f"{place}/$ref is {reference!r}, but there is nothing there; add it to $defs") from None


def _check_numbers(schema: Schema, name: str) -> None:
    """Refuse numbers that llguidance would take for others, or not survive."""
    for pointer, subschema in subschemas(schema, name):
        if not isinstance(subschema, Mapping):
            continue
        for key in ("const", "enum"):
            for number in _numbers_in(subschema.get(key)):
                if abs(number) > EXACT:
                    raise OptionError(
                        f"{name}#{pointer}/{key} has {number}, expected numbers from -{EXACT} to {EXACT}, beyond which "
                        "they cannot be told apart; make it a string"
                    )
        for key in ("maximum", "exclusiveMaximum"):
            if subschema.get(key, 0) < -LARGEST:
                raise OptionError(
                    f"{name}#{pointer}/{key} is {subschema[key]}, expected at least -{LARGEST}; leave it out"
                )


def _numbers_in(value: object) -> Iterator[float]:
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if _is_number(current):
            yield current  # type: ignore[misc]
        elif isinstance(current, Mapping):
            waiting += current.values()
        elif isinstance(current, (list, tuple)):
            waiting += current


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON text under a schema, in llguidance's form."""
    options: Any = COMPILE_OPTIONS
    return LLMatcher.grammar_from_json_schema(json.dumps(enforceable(schema)), overrides=options)


def enforceable(schema: Any) -> Any:
    """`schema` with what llguidance takes too loosely said in another way."""
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in with_format_pattern(schema).items():
        if key in SCHEMA_KEYS:
            result[key] = enforceable(value)
        elif key in SCHEMA_LIST_KEYS:
            result[key] = [enforceable(item) for item in value]
        elif key in SCHEMA_MAP_KEYS:
            result[key] = {name: enforceable(item) for name, item in value.items()}
        else:
            result[key] = value
    return _with_ends(result)


def _with_ends(schema: dict[str, Any]) -> dict[str, Any]:
    """An integer that has no bounds ends at 19 digits: one that goes on is a known way for a model to lose itself."""
    given = schema.get("type", ())
    types = [given] if isinstance(given, str) else given
    if "integer" not in types or "number" in types:
        return schema
    if not schema.keys().isdisjoint(("multipleOf", "const", "enum")):
        return schema
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    ends = {}
    if low is None and (high is None or high > -LARGEST):
        ends["minimum"] = -LARGEST
    if high is None and (low is None or low < LARGEST):
        ends["maximum"] = LARGEST
    return schema | ends


def _refusal(schema: Schema) -> str:
    """Why llguidance refuses the schema, "" if it does not."""
    if isinstance(schema, bool):
        return "" if schema else "the schema is false, which allows no value"
    is_error, messages = LLMatcher.validate_grammar_with_warnings(json_grammar(schema))
    return one_line(*messages) if is_error or messages else ""


def _nearest(keyword: str) -> str:
    close = difflib.get_close_matches(keyword, [*_VALUE_CHECKS, *ANNOTATIONS], 1)
    return f", the nearest known one is {close[0]!r}" if close else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)  # type: ignore[operator, call-overload]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def _is_type(value: object) -> bool:
    types = [value] if isinstance(value, str) else value
    return _is_list(types) and all(one in JSON_TYPES for one in types)  # type: ignore[attr-defined]


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_anything(value: object) -> bool:
    return True


def _is_schema(value: object) -> bool:
    return isinstance(value, (Mapping, bool))


_Check = tuple[str, Callable[[object], bool]]
_COUNT: _Check = ("a whole number of at least 0", _is_count)
_NUMBER: _Check = ("a number", _is_number)
_TEXT: _Check = ("a string", _is_text)
_SCHEMA: _Check = ("one schema (a list of schemas is prefixItems)", _is_schema)
_SCHEMAS: _Check = ("a list of at least one schema", _is_list)
_SCHEMA_MAP: _Check = ("an object of schemas", _is_map)

_VALUE_CHECKS: Mapping[str, _Check] = {
    "type": (f"a type or a list of types out of {', '.join(JSON_TYPES)}", _is_type),
    "enum": ("a list of at least one value", _is_list),
    "const": ("a value", _is_anything),
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),  # type: ignore[operator]
    "pattern": _TEXT,
    "format": _TEXT,
    "$ref": _TEXT,
    "required": ("a list of names", _is_names),
    "items": _SCHEMA,
    "additionalProperties": _SCHEMA,
    "anyOf": _SCHEMAS,
    "oneOf": _SCHEMAS,
    "allOf": _SCHEMAS,
    "prefixItems": _SCHEMAS,
    "properties": _SCHEMA_MAP,
    "patternProperties": _SCHEMA_MAP,
    "$defs": _SCHEMA_MAP,
    "definitions": _SCHEMA_MAP,
}
