"""JSON schemas to rules for literals: Python's spelling, as LFM writes arguments, or JSON's.

What is written here directly: types, enum, const, string lengths, integer bounds, arrays, objects, anyOf, disjoint
oneOf and references, also recursive ones. The rest (pattern, format, allOf, ...) goes to llguidance's own `%json`,
whose output is a literal in both spellings: JSON strings without `\\u` and `\\/` are Python strings, and the words
true, false and null are kept out of the places where they are none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from lfm_mlx.constrain.integer_range import MAX_DIGITS, integer_range
from lfm_mlx.constrain.lark_rules import LarkRules, either, glued, pattern, quoted
from lfm_mlx.constrain.members import COLON, COMMA, Member, repeats, sequence
from lfm_mlx.constrain.schema_check import ANNOTATIONS, JSON_TYPES, check_compiles, enforceable
from lfm_mlx.constrain.schema_tree import Schema, resolve, subschemas
from lfm_mlx.errors import OptionError

Form = Literal["pythonic", "json"]

_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
_NUMBER = r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,2})?"
_PLAIN = {"'": r"[^'\\\x00-\x1f\x7f]", '"': r"[^\"\\\x00-\x1f\x7f]"}
_ESCAPE = {"pythonic": r"\\[\\\"'nrt]", "json": r"\\[\\\"nrtbf]"}
_ESCAPED = re.compile(r"[\x00-\x1f\x7f\"'\\]")
_WORDS = {True: "True", False: "False", None: "None"}
_NOT_ASKED = ANNOTATIONS | {"$defs", "definitions"}
_STRING_KEYS = {"minLength", "maxLength"}
_ARRAY_KEYS = {"items", "prefixItems", "minItems", "maxItems"}
# Longer lists have rules of their own: each repeat within a terminal would be another state of the lexer.
_MAX_REPEATS = 128
_OBJECT_KEYS = {"properties", "required", "additionalProperties", "minProperties", "maxProperties"}
_SHAPE_KEYS = {"anyOf", "oneOf", "allOf", "$ref", "enum", "const"}
_KEYS_BY_TYPE = {
    "string": _STRING_KEYS | {"pattern", "format"},
    "array": _ARRAY_KEYS,
    "object": _OBJECT_KEYS | {"patternProperties"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}


class LiteralGrammar:
    """Writes rules for the values of one root schema.

    Args:
        rules: where rules are written.
        root: what references in it start from.
        form: the spelling.
        name: what errors call the root.
        has_references: as of `root`.
    """

    def __init__(self, rules: LarkRules, root: Schema, form: Form, name: str, *, has_references: bool) -> None:
        self._rules = rules
        self._root = root
        self._form = form
        self._name = name
        self._has_references = has_references
        self._references: dict[tuple[str, bool], str] = {}

    def value(self, schema: Schema, *, is_inner: bool = True, text: str | None = None) -> str:
        """The name of a rule for the values that `schema` allows.

        Args:
            schema: has passed `check_schema`.
            is_inner: inside a container, where the Pythonic form takes `true` as well as `True`.
            text: `asked_text(schema)` where it is known, and the root has no references.
        """
        # The same few schemas stand in every tool.
        name = None if text is None else self._rules.written.get((text, is_inner))
        if name is not None:
            return name
        if schema is False:
            raise OptionError(f"{self._name}: a value's schema is false, which allows none; remove the parameter")
        schema = {} if schema is True else schema
        asked = {key: value for key, value in schema.items() if key not in _NOT_ASKED}
        if self._has_references:
            return self._asked(schema, asked, is_inner)
        key = (repr(asked), is_inner)
        name = self._rules.written.get(key)
        if name is None:
            name = self._rules.written[key] = self._asked(schema, asked, is_inner)
        return name

    def _asked(self, schema: Mapping[str, Any], asked: Mapping[str, Any], is_inner: bool) -> str:
        asked = {key: value for key, value in asked.items() if not key.startswith("x-")}
        shape = _SHAPE_KEYS & asked.keys()
        if not asked:
            return self._anything(is_inner)
        if not shape:
            return self._rules.rule(either(self._typed(asked, is_inner)))
        if len(asked.keys() - {"type"}) > 1 or (len(asked) > 1 and shape & {"$ref", "anyOf", "oneOf", "allOf"}):
            return self._delegate(schema, is_inner)
        return self._rules.rule(self._shaped(asked, shape.pop(), is_inner))

    def _shaped(self, asked: Mapping[str, Any], key: str, is_inner: bool) -> str:
        value = asked[key]
        if key in ("enum", "const"):
            values = value if key == "enum" else [value]
            return either(self._constants(values, asked.get("type"), is_inner))
        if key == "$ref":
            return self._reference(value, is_inner)
        if key == "allOf" and len(value) == 1:
            return self.value(value[0], is_inner=is_inner)
        if key == "anyOf" or (key == "oneOf" and self._are_disjoint(value)):
            return either(self.value(one, is_inner=is_inner) for one in value if one is not False)
        return self._delegate({key: value}, is_inner)

    def _reference(self, reference: str, is_inner: bool) -> str:
        key = (reference, is_inner)
        if key not in self._references:
            name = self._references[key] = self._rules.reserve()
            target: Any = resolve(reference, self._root)
            self._rules.define(name, self.value(target, is_inner=is_inner))
        return self._references[key]

    def _anything(self, is_inner: bool) -> str:
        """Any value: a rule that comes back to itself within containers."""
        key = ("", is_inner)
        if key not in self._rules.written:
            name = self._rules.written[key] = self._rules.reserve()
            self._rules.define(name, either(self._typed({}, is_inner)))
        return self._rules.written[key]

    def _typed(self, asked: Mapping[str, Any], is_inner: bool) -> list[str]:
        types = asked.get("type", JSON_TYPES)
        types = [types] if isinstance(types, str) else list(types)
        if "number" in types:
            types = [one for one in types if one != "integer"]
        return [self._one_type(one, asked, is_inner) for one in types]

    def _one_type(self, kind: str, asked: Mapping[str, Any], is_inner: bool) -> str:
        own = {key: value for key, value in asked.items() if key in _KEYS_BY_TYPE[kind]}
        if kind == "boolean":
            return self._rules.terminal(either(map(quoted, self._words([True, False], is_inner))))
        if kind == "null":
            return self._rules.terminal(either(map(quoted, self._words([None], is_inner))))
        if kind == "string" and own.keys() <= _STRING_KEYS:
            return self._string(own.get("minLength", 0), own.get("maxLength"))
        if kind == "number" and not own:
            return self._rules.terminal(pattern(_NUMBER))
        if kind == "integer" and "multipleOf" not in own:
            return self._integer(own)
        if kind == "array":
            return self._array(own)
        if kind == "object" and self._is_plain_object(own):
            return self._object(own)
        return self._delegate({"type": kind, **own}, is_inner)

    def _integer(self, own: Mapping[str, Any]) -> str:
        low = [math.ceil(own["minimum"])] if "minimum" in own else []
        low += [math.floor(own["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in own else []
        high = [math.floor(own["maximum"])] if "maximum" in own else []
        high += [math.ceil(own["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in own else []
        regex = integer_range(max(low, default=None), min(high, default=None))
        if regex is None:
            least, most = max(low, default="none"), min(high, default="none")
            raise OptionError(
                f"{self._name}: no integer of up to {MAX_DIGITS} digits lies between minimum {least} and maximum {most}"
            )
        return self._rules.terminal(pattern(regex))

    def _words(self, values: Sequence[bool | None], is_inner: bool) -> list[str]:
        python = [_WORDS[value] for value in values] if self._form == "pythonic" else []
        return python + ([json.dumps(value) for value in values] if is_inner or self._form == "json" else [])

    @property
    def _quotes(self) -> str:
        return "\"'" if self._form == "pythonic" else '"'

    def _string(self, minimum: float, maximum: float | None) -> str:
        low, high = int(minimum), "" if maximum is None else int(maximum)
        repeat = "*" if (low, high) == (0, "") else f"{{{low},{high}}}"
        escape = _ESCAPE[self._form]
        return self._rules.terminal(
            pattern("|".join(f"{quote}({_PLAIN[quote]}|{escape}){repeat}{quote}" for quote in self._quotes))
        )

    def _array(self, own: Mapping[str, Any]) -> str:
        prefix: Sequence[Schema] = own.get("prefixItems", [])
        items: Schema = own.get("items", True)
        low = int(own.get("minItems", 0))
        high = int(own["maxItems"]) if "maxItems" in own else None
        if items is False:
            high = len(prefix) if high is None else min(high, len(prefix))
        if high is not None and low > high:
            raise OptionError(f"{self._name}: minItems is {low} and at most {high} items are possible; no array fits")
        if high == 0:
            return self._rules.rule('"[]"')
        if max(low, high or 0) > _MAX_REPEATS:
            self._rules.leave_regular()
        # The first item has no comma before it, so it is spelled out even where there is no prefix.
        heads = [*(prefix or [items])][:high]
        body = ""
        if high is None or high > len(heads):
            limit = None if high is None else high - len(heads)
            body = f"({COMMA} {self.value(items)}){repeats(max(low - len(heads), 0), limit)}"
        for index in reversed(range(len(heads))):
            body = glued(glued(COMMA if index else "", self.value(heads[index])), body)
            body = body if index < low else f"({body})?"
        return self._rules.rule(f'"["{body}"]"')

    def _is_plain_object(self, own: Mapping[str, Any]) -> bool:
        """Whether every property is named, or every one is free: where both mix, llguidance keeps the keys apart."""
        named = {*own.get("properties", {}), *own.get("required", ())}
        extra = own.get("additionalProperties")
        num_required = len(set(own.get("required", ())))
        if "patternProperties" in own or (named and extra not in (None, False)):
            return False
        if named:
            return own.get("minProperties", 0) <= num_required and bool(
                own.get("maxProperties", len(named)) >= len(named)
            )
        return True

    def _object(self, own: Mapping[str, Any]) -> str:
        if not property_schemas(own):
            return self._map(own)
        return self._rules.rule(sequence(self._rules, '"{"', self.members(own, {}), '"}"'))

    def members(self, own: Mapping[str, Any], texts: Mapping[str, str]) -> list[Member]:
        """The named properties of an object in order; `texts`: the `asked_text` of those where it is known."""
        required = set(own.get("required", ()))
        return [
            (self._pair(key, self.value(schema, text=texts.get(key))), key in required)
            for key, schema in property_schemas(own).items()
            if schema is not False or key in required
        ]

    def _map(self, own: Mapping[str, Any]) -> str:
        """An object with free keys."""
        extra: Schema = own.get("additionalProperties", True)
        low, high = int(own.get("minProperties", 0)), own.get("maxProperties")
        if extra is False or high == 0:
            return self._rules.rule('"{}"')
        if max(low, high or 0) > _MAX_REPEATS:
            self._rules.leave_regular()
        free_key = pattern("|".join(f"{quote}{_PLAIN[quote]}*{quote}" for quote in self._quotes))
        pair = self._rules.rule(f"{self._rules.terminal(f'{free_key} {COLON}')} {self.value(extra)}")
        body = pair
        if high != 1:
            body += f"({COMMA} {pair}){repeats(max(low - 1, 0), None if high is None else int(high) - 1)}"
        return self._rules.rule(f'"{{"{body}"}}"' if low else f'"{{"({body})?"}}"')

    def _pair(self, key: str, value: str) -> str:
        """The body of a key and a value's rule."""
        body = _key_body(key, self._quotes)
        if not self._rules.is_regular:
            return glued(self._rules.terminal(body + COLON), value)
        # Few values stand behind many keys: each is written once with its colon.
        return body + self._rules.terminal(f"{COLON} {value}")

    def _spellings(self, text: str) -> list[str]:
        return [spell_string(text, quote) for quote in self._quotes]

    def _constants(self, values: Sequence[Any], types: Any, is_inner: bool) -> Iterable[str]:
        allowed = JSON_TYPES if types is None else [types] if isinstance(types, str) else types
        values = [value for value in values if _type_of(value) & set(allowed)]
        if not values:
            raise OptionError(f"{self._name}: no value of an enum is of its type {types!r}; correct one of them")
        scalars = [text for value in values for text in self._scalar(value, is_inner)]
        yield from [self._rules.terminal(either(map(quoted, scalars)))] if scalars else []
        yield from (self._container(value) for value in values if isinstance(value, (list, tuple, Mapping)))

    def _scalar(self, value: Any, is_inner: bool) -> list[str]:
        if isinstance(value, str):
            return self._spellings(value)
        if value is None or isinstance(value, bool):
            return self._words([value], is_inner)
        return [json.dumps(value)] if isinstance(value, (int, float)) else []

    def _container(self, value: Any) -> str:
        if isinstance(value, Mapping):
            pairs = [(self._pair(key, self.value({"const": inner})), True) for key, inner in value.items()]
            return self._rules.rule(sequence(self._rules, '"{"', pairs, '"}"'))
        pairs = [(self.value({"const": inner}), True) for inner in value]
        return self._rules.rule(sequence(self._rules, '"["', pairs, '"]"'))

    def _delegate(self, schema: Mapping[str, Any], is_inner: bool) -> str:
        """Let llguidance write the schema, in JSON's spelling."""
        self._rules.leave_regular()
        root = self._root if isinstance(self._root, Mapping) else {}
        asked = {key: value for key, value in schema.items() if not _is_annotation(key)}
        whole: dict[str, Any] = {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **asked}
        if (
            not is_inner
            and self._form == "pythonic"
            and asked.get("type") not in ("string", "integer", "number", "array", "object")
        ):
            others = {"type": ["string", "number", "array", "object"]}
            whole["allOf"] = [*whole.get("allOf", []), others]
        for pointer, inner in subschemas(whole):
            reference = inner.get("$ref", "#/$defs/") if isinstance(inner, Mapping) else "#/$defs/"
            if not reference.startswith(("#/$defs/", "#/definitions/")):
                raise OptionError(
                    f"{self._name}: {pointer}/$ref is {reference!r}, expected '#/$defs/name' next to the keywords that "
                    f"are used there ({', '.join(asked)}); move the schema it points to into $defs"
                )
        check_compiles(whole, f"{self._name} (in part)")
        return self._rules.rule(f"%json {json.dumps({'x-guidance': _JSON_OPTIONS, **enforceable(whole)})}")

    def _are_disjoint(self, schemas: Sequence[Schema]) -> bool:
        """Whether no value can match two of the schemas, judged by their types alone."""
        seen: set[str] = set()
        for schema in schemas:
            kinds = self._kinds(schema, 8)
            if seen & kinds:
                return False
            seen |= kinds
        return True

    def _kinds(self, schema: Schema, depth: int) -> set[str]:
        """The types that a schema's values may have; an integer counts as a number."""
        everything = set(JSON_TYPES) - {"integer"}
        if isinstance(schema, bool) or not depth:
            return set() if schema is False else everything
        if "$ref" in schema:
            target: Any = resolve(schema["$ref"], self._root)
            return self._kinds(target, depth - 1)
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            return {kind for value in values for kind in _type_of(value)} - {"integer"}
        types = schema.get("type", everything)
        return {"number" if one == "integer" else one for one in ([types] if isinstance(types, str) else types)}


def asked_text(schema: Mapping[str, Any]) -> str:
    """What a schema asks for, without annotations and definitions: equal texts have equal rules."""
    return repr({key: value for key, value in schema.items() if key not in _NOT_ASKED})


def property_schemas(own: Mapping[str, Any]) -> dict[str, Schema]:
    """The named properties of an object schema in order, those that are only required last."""
    extra: Schema = own.get("additionalProperties", True)
    return {
        **own.get("properties", {}),
        **{key: extra for key in own.get("required", ()) if key not in own.get("properties", {})},
    }


def spell_string(text: str, quote: str) -> str:
    """`text` as a string literal that reads back exactly, in Python and, with double quotes, in JSON."""
    if not _ESCAPED.search(text):
        return quote + text + quote
    escapes = {"\\": "\\\\", quote: "\\" + quote, "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return (
        quote + "".join(escapes.get(c) or (f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c) for c in text) + quote
    )


@lru_cache(maxsize=4096)
def _key_body(key: str, quotes: str) -> str:
    return either(quoted(spell_string(key, quote)) for quote in quotes)


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if value == int(value) else {"number"}
    names: list[tuple[Any, str]] = [(str, "string"), (Mapping, "object"), ((list, tuple), "array")]
    return next(({name} for kind, name in names if isinstance(value, kind)), {"null"})


def _is_annotation(key: str) -> bool:
    return key in _NOT_ASKED or key.startswith("x-")
