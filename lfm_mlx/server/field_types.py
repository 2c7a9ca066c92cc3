"""What the fields of a request may hold: declared once, for checking requests and for describing them."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lfm_mlx.server.http_errors import ApiError

Schema = dict[str, Any]
"""A JSON schema."""


def describe(value: object) -> str:
    """A JSON value in a few words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the string {value[:60]!r}" + ("..." if len(value) > 60 else "")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return f"{value!r:.60}"


def wrong(path: str, value: object, expected: str, *, code: str = "invalid_value") -> ApiError:
    """The error for a value that is not what it should be."""
    place = path or "the request"
    return ApiError(f"{place} is {describe(value)}, expected {expected}", param=path or None, code=code)


class FieldType(ABC):
    """What one JSON value has to be."""

    expected: str
    """In words."""

    @abstractmethod
    def is_kind(self, value: object) -> bool:
        """Whether the value has the right JSON type."""

    @abstractmethod
    def schema(self) -> Schema:
        """The same as a JSON schema."""

    def read(self, value: Any, path: str) -> Any:
        """The value, checked.

        Raises:
            ApiError: with the path, what was found, and what was expected.
        """
        if not self.is_kind(value):
            raise wrong(path, value, self.expected, code="invalid_type")
        return self.checked(value, path)

    def checked(self, value: Any, path: str) -> Any:
        """A value of the right JSON type, checked further."""
        return value


class Text(FieldType):
    """A string."""

    def __init__(self, *, min_len: int = 0, max_len: int | None = None) -> None:
        self._min, self._max = min_len, max_len
        self.expected = "a string" + (" that is not empty" if min_len else "")
        self.expected += f" of at most {max_len} characters" if max_len else ""

    def is_kind(self, value: object) -> bool:
        return isinstance(value, str)

    def checked(self, value: Any, path: str) -> Any:
        if len(value) < self._min or len(value) > (self._max or math.inf):
            raise wrong(path, value, self.expected)
        return value

    def schema(self) -> Schema:
        bounds = {"minLength": self._min or None, "maxLength": self._max}
        return {"type": "string"} | {key: bound for key, bound in bounds.items() if bound}


class Number(FieldType):
    """A finite number, or a whole one."""

    def __init__(
        self,
        minimum: float | None = None,
        maximum: float | None = None,
        *,
        above: float | None = None,
        whole: bool = False,
    ) -> None:
        self._minimum, self._maximum, self._above, self._is_whole = minimum, maximum, above, whole
        bounds = [f"above {above}"] if above is not None else []
        bounds += [f"at least {minimum}"] if minimum is not None else []
        bounds += [f"at most {maximum}"] if maximum is not None else []
        self.expected = ("a whole number" if whole else "a number") + (f", {' and '.join(bounds)}" if bounds else "")

    def is_kind(self, value: object) -> bool:
        if isinstance(value, bool):
            return False
        return isinstance(value, int) or (isinstance(value, float) and (not self._is_whole or value.is_integer()))

    def checked(self, value: Any, path: str) -> Any:
        low, high, above = self._minimum, self._maximum, self._above
        is_low = (low is not None and value < low) or (above is not None and value <= above)
        if is_low or (high is not None and value > high):
            raise wrong(path, value, self.expected)
        return int(value) if self._is_whole else value

    def schema(self) -> Schema:
        bounds = {"minimum": self._minimum, "maximum": self._maximum, "exclusiveMinimum": self._above}
        kind = "integer" if self._is_whole else "number"
        return {"type": kind} | {key: bound for key, bound in bounds.items() if bound is not None}


def whole(minimum: int | None = None, maximum: int | None = None) -> Number:
    """A whole number."""
    return Number(minimum, maximum, whole=True)


class Flag(FieldType):
    """True or false."""

    expected = "true or false"

    def is_kind(self, value: object) -> bool:
        return isinstance(value, bool)

    def schema(self) -> Schema:
        return {"type": "boolean"}


class OneOf(FieldType):
    """One of a few values, `advice` saying why no other."""

    def __init__(self, *values: object, advice: str = "") -> None:
        self._values = values
        listed = " or ".join(f'"{value}"' if isinstance(value, str) else describe(value) for value in values)
        self.expected = listed + (f"; {advice}" if advice else "")

    def is_kind(self, value: object) -> bool:
        return any(type(value) is type(one) for one in self._values)

    def checked(self, value: Any, path: str) -> Any:
        if not any(type(value) is type(one) and value == one for one in self._values):
            raise wrong(path, value, self.expected)
        return value

    def schema(self) -> Schema:
        return {"enum": list(self._values)}


class Refused(FieldType):
    """A field that other servers honour and this one does not."""

    def __init__(self, advice: str) -> None:
        self.expected = f"no such field: this server does not honour it; {advice}"

    def is_kind(self, value: object) -> bool:
        return False

    def schema(self) -> Schema:
        return {"type": "null"}


class AnyValue(FieldType):
    """Any JSON value."""

    expected = "a JSON value"

    def is_kind(self, value: object) -> bool:
        return True

    def schema(self) -> Schema:
        return {}


class AnyObject(FieldType):
    """An object with any names, its values of one type."""

    def __init__(self, of: FieldType | None = None) -> None:
        self._of = of
        self.expected = "an object"

    def is_kind(self, value: object) -> bool:
        return isinstance(value, dict)

    def checked(self, value: Any, path: str) -> Any:
        of = self._of
        return value if of is None else {key: of.read(item, f"{path}.{key}") for key, item in value.items()}

    def schema(self) -> Schema:
        return {"type": "object"} | ({"additionalProperties": self._of.schema()} if self._of else {})


class ListOf(FieldType):
    """A list."""

    def __init__(self, of: FieldType, *, min_len: int = 0, max_len: int | None = None) -> None:
        self._of, self._min, self._max = of, min_len, max_len
        self.expected = "a list" + (f" of at least {min_len}" if min_len else "")
        self.expected += f" of at most {max_len}" if max_len else ""

    def is_kind(self, value: object) -> bool:
        return isinstance(value, list) and all(self._of.is_kind(item) for item in value[:1])

    def read(self, value: Any, path: str) -> Any:
        if not isinstance(value, list):
            raise wrong(path, value, self.expected, code="invalid_type")
        if len(value) < self._min or len(value) > (self._max or math.inf):
            raise wrong(path, value, self.expected)
        return [self._of.read(item, f"{path}[{index}]") for index, item in enumerate(value)]

    def schema(self) -> Schema:
        bounds = {"minItems": self._min or None, "maxItems": self._max}
        return {"type": "array", "items": self._of.schema()} | {key: bound for key, bound in bounds.items() if bound}


class Fields(FieldType):
    """An object with these fields and no others; null stands for a field that is not given.

    Args:
        fields: by name.
        required: the names that must be there.
    """

    def __init__(self, fields: Mapping[str, FieldType], *, required: Sequence[str] = ()) -> None:
        self.fields, self.required = dict(fields), tuple(required)
        self.expected = "an object" + (f" with {', '.join(required)}" if required else "")

    def is_kind(self, value: object) -> bool:
        return isinstance(value, dict)

    def checked(self, value: Any, path: str) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name, item in value.items():
            place = f"{path}.{name}" if path else name
            if name not in self.fields:
                raise self._unknown(place, name)
            if item is not None:
                read[name] = self.fields[name].read(item, place)
        for name in self.required:
            if name not in read:
                place = f"{path}.{name}" if path else name
                raise ApiError(
                    f"{place} is missing, expected {self.fields[name].expected}", param=place, code="missing_field"
                )
        return read

    def _unknown(self, place: str, name: str) -> ApiError:
        close = difflib.get_close_matches(name[:80], self.fields, n=1)
        advice = f"did you mean {close[0]}?" if close else f"expected only {', '.join(self.fields)}; leave it out"
        return ApiError(
            f"{place[:200]} is no field that this server honours; {advice}", param=place[:200], code="unknown_field"
        )

    def schema(self) -> Schema:
        optional = {
            name: field.schema() if name in self.required else {"anyOf": [field.schema(), {"type": "null"}]}
            for name, field in self.fields.items()
        }
        required = {"required": list(self.required)} if self.required else {}
        return {"type": "object", "properties": optional, "additionalProperties": False} | required


class Either(FieldType):
    """One of several types, told apart by the JSON type of the value."""

    def __init__(self, *types: FieldType) -> None:
        self._types = types
        self.expected = " or ".join(one.expected for one in types)

    def is_kind(self, value: object) -> bool:
        return any(one.is_kind(value) for one in self._types)

    def read(self, value: Any, path: str) -> Any:
        for one in self._types:
            if one.is_kind(value):
                return one.read(value, path)
        if isinstance(value, list):
            for one in self._types:
                if isinstance(one, ListOf):
                    return one.read(value, path)
        raise wrong(path, value, self.expected, code="invalid_type")

    def schema(self) -> Schema:
        return {"anyOf": [one.schema() for one in self._types]}


class Tagged(FieldType):
    """One of several objects, told apart by one of their fields.

    Args:
        tag: the name of that field.
        kinds: the objects, by what the field says.
        fallback: what it says where it is not given; None requires it.
        advice: why there is nothing else.
    """

    def __init__(
        self, tag: str, kinds: Mapping[str, FieldType], *, fallback: str | None = None, advice: str = ""
    ) -> None:
        self._tag, self._kinds, self._fallback = tag, dict(kinds), fallback
        self._choice = OneOf(*kinds, advice=advice)
        self.expected = f"an object with {tag}"

    def is_kind(self, value: object) -> bool:
        return isinstance(value, dict)

    def checked(self, value: Any, path: str) -> Any:
        place = f"{path}.{self._tag}" if path else self._tag
        named = value.get(self._tag)
        if named is None and self._fallback is None:
            raise ApiError(f"{place} is missing, expected {self._choice.expected}", param=place, code="missing_field")
        named = self._choice.read(named if named is not None else self._fallback, place)
        return {**self._kinds[named].read(value, path), self._tag: named}

    def schema(self) -> Schema:
        return {"anyOf": [self._kind_schema(name, kind) for name, kind in self._kinds.items()]}

    def _kind_schema(self, name: str, kind: FieldType) -> Schema:
        schema = kind.schema()
        schema.get("properties", {})[self._tag] = {"const": name}
        required = [*schema.get("required", []), self._tag] if name != self._fallback else schema.get("required", [])
        return schema | ({"required": list(dict.fromkeys(required))} if required else {})
