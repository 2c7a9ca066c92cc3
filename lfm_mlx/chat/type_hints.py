"""Type hints as JSON schemas, and Python values made of JSON ones."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import inspect
import itertools
import json
import re
import sys
import types
import typing
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from lfm_mlx.errors import OptionError

MISSING: Final = inspect.Parameter.empty

_SCALARS: Final[dict[Any, tuple[str, str]]] = {
    str: ("string", "a string"),
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    bool: ("boolean", "true or false"),
    type(None): ("null", "null"),
}
# Path has no format: JSON Schema knows none for it, and constrained decoding refuses formats that it cannot enforce.
_TEXT_TYPES: Final[dict[Any, tuple[str | None, Callable[[str], Any]]]] = {
    datetime.datetime: ("date-time", lambda text: datetime.datetime.fromisoformat(_without_z(text))),
    datetime.date: ("date", datetime.date.fromisoformat),
    datetime.time: ("time", lambda text: datetime.time.fromisoformat(_without_z(text))),
    uuid.UUID: ("uuid", uuid.UUID),
    Path: (None, Path),
}
_LISTS: Final = {kind: kind for kind in (list, tuple, set, frozenset)} | {
    Sequence: list,
    Iterable: list,
    Collection: list,
}
_DICTS: Final = (dict, Mapping, MutableMapping)
_ANYTHING: Final = (MISSING, Any, object)

_SECTION: Final = re.compile(
    r"(?:(Args|Arguments|Parameters|Params|Keyword Args|Other Parameters)|[A-Z][\w ]{2,30}):?$"
)
_GOOGLE_ENTRY: Final = re.compile(r"\*{0,2}(\w+)\s*(?:\(.*?\))?\s*:\s+(.*)")
_NUMPY_ENTRY: Final = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?()$")
_SPHINX_ENTRY: Final = re.compile(
    r":(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)"
)


class Member(NamedTuple):
    """A parameter of a function or a field of a class."""

    name: str
    annotation: Any
    default: Any = MISSING
    is_required: bool = True


class Form(NamedTuple):
    """A type hint: the JSON schema of its values, and how one is made of JSON; `read` takes a value and its place."""

    schema: dict[str, Any]
    read: Callable[[Any, str], Any]


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and what a docstring says about each argument."""
    lines = inspect.cleandoc(text).splitlines()
    is_entry_due = False
    summary: list[str] = []
    entries: dict[str, list[str]] = {}
    current: list[str] | None = summary
    pattern, depth, base = _GOOGLE_ENTRY, 0, 0
    for line, following in zip(lines, [*lines, ""][1:], strict=True):
        indent, body = len(line) - len(line.lstrip()), line.strip()
        is_numpy = re.fullmatch(r"-{3,}", following.strip()) is not None
        section = _SECTION.match(body) if indent == 0 and (is_numpy or body.endswith(":")) else None
        match = _SPHINX_ENTRY.match(body)
        if section is not None:
            is_entry_due = section[1] is not None
            pattern, base, current = (_NUMPY_ENTRY, 0, None) if is_numpy else (_GOOGLE_ENTRY, -1, None)
            continue
        if match is None and is_entry_due and body:
            base = indent if base < 0 else base
            match = pattern.match(body) if indent == base else None
        if match is not None:
            current, depth = [match[2]], indent
            entries |= {name.strip(" *"): current for name in match[1].split(",")}
        elif not body or body.startswith((":", "---")):
            current = None if current is summary and summary else current
        elif current is not None and (current is summary or indent > depth):
            current.append(body)
        elif current is not summary:
            current = None
    return " ".join(summary), {name: " ".join(filter(None, parts)) for name, parts in entries.items()}


class Forms:
    """Reads type hints; `definitions` is what their schemas refer to."""

    def __init__(self) -> None:
        self._definitions: dict[str, Any] = {}
        self._open: list[Any] = []

    def of_function(self, function: Callable[..., Any], descriptions: Mapping[str, str] | None = None) -> Form:
        """The form of a function's arguments, an object."""
        name = getattr(function, "__name__", "function")
        form = self._of_members(_parameters(function, name), descriptions or {}, f"{name}: parameter ", dict)
        if self._definitions:
            form.schema["$defs"] = self._definitions
        return form

    def _of_members(
        self, members: Sequence[Member], descriptions: Mapping[str, str], place: str, make: Callable[..., Any]
    ) -> Form:
        forms = {member.name: self.of(member.annotation, f"{place}{member.name!r}") for member in members}
        required = [member.name for member in members if member.is_required]
        for member in members:
            schema = forms[member.name].schema
            if descriptions.get(member.name):
                schema.setdefault("description", descriptions[member.name])
            if member.default is not MISSING and member.default is not None:
                schema |= _default(member.default)

        def read(value: Any, place: str) -> Any:
            if not isinstance(value, Mapping):
                raise _wrong(place, value, "an object")
            unknown = [name for name in value if name not in forms]
            missing = [name for name in required if name not in value]
            if unknown:
                raise OptionError(
                    f"{place} hold {unknown[0]!r}, expected only {', '.join(forms) or 'none'}; leave it out"
                )
            if missing:
                raise OptionError(f"{place} lack {missing[0]!r}, expected {', '.join(required)}; give it")
            return make(**{name: forms[name].read(entry, f"{place}: {name}") for name, entry in value.items()})

        properties = {name: form.schema for name, form in forms.items()}
        return Form({"type": "object", "properties": properties, **({"required": required} if required else {})}, read)

    def of(self, annotation: Any, place: str) -> Form:
        """The form of one type hint."""
        bare, description = _unwrap(annotation)
        schema, read = self._of_bare(bare, place)
        return Form({**schema, "description": description} if description else dict(schema), read)

    def _of_bare(self, annotation: Any, place: str) -> Form:
        origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
        if origin in _ANYTHING:
            return Form({}, lambda value, place: value)
        if origin in _SCALARS:
            return Form({"type": _SCALARS[origin][0]}, functools.partial(_read_scalar, origin))
        if origin in _TEXT_TYPES:
            name = _TEXT_TYPES[origin][0]
            return Form({"type": "string"} | ({"format": name} if name else {}), functools.partial(_read_text, origin))
        if origin in (typing.Union, types.UnionType):
            forms = [self.of(arg, place) for arg in args]
            return Form({"anyOf": [form.schema for form in forms]}, functools.partial(_read_either, forms))
        if origin is Literal or (isinstance(origin, type) and issubclass(origin, enum.Enum)):
            return _of_options(origin, args, place)
        if origin in _LISTS:
            return self._of_list(origin, args, place)
        if origin in _DICTS:
            return self._of_dict(args, place)
        return self._of_class(origin, place)

    def _of_list(self, origin: Any, args: tuple[Any, ...], place: str) -> Form:
        forms = [self.of(arg, place) for arg in args if arg is not ...]
        is_fixed = origin is tuple and bool(args) and args[-1] is not ...
        schema: dict[str, Any] = {"type": "array"}
        if is_fixed:
            schema |= {"prefixItems": [form.schema for form in forms], "minItems": len(forms), "maxItems": len(forms)}
        elif forms and forms[0].schema:
            schema["items"] = forms[0].schema

        def read(value: Any, place: str) -> Any:
            if not isinstance(value, (list, tuple)) or (is_fixed and len(value) != len(forms)):
                raise _wrong(place, value, f"a list of {len(forms)}" if is_fixed else "a list")
            each = forms if is_fixed else (forms or [Form({}, lambda item, place: item)]) * len(value)
            items = [form.read(item, f"{place}[{i}]") for i, (form, item) in enumerate(zip(each, value, strict=True))]
            return _LISTS[origin](items)

        return Form(schema, read)

    def _of_dict(self, args: tuple[Any, ...], place: str) -> Form:
        if args and _unwrap(args[0])[0] not in (str, Any):
            raise OptionError(
                f"{place} is a dict with keys of {_type_name(args[0])}, expected dict[str, ...] as in JSON"
            )
        form = self.of(args[1] if args else Any, place)

        def read(value: Any, place: str) -> Any:
            if not isinstance(value, Mapping):
                raise _wrong(place, value, "an object")
            return {key: form.read(item, f"{place}[{key!r}]") for key, item in value.items()}

        return Form({"type": "object", **({"additionalProperties": form.schema} if form.schema else {})}, read)

    def _of_class(self, kind: Any, place: str) -> Form:
        if hasattr(kind, "model_json_schema"):  # pydantic, which need not be installed
            return Form(self._schema_of_model(kind), functools.partial(_read_model, kind))
        members = _fields(kind)
        if members is None:
            raise OptionError(
                f"{place} has the type hint {_type_name(kind)}, which has no JSON form; expected str, int, float, "
                "bool, None, list, dict, tuple, Literal, Enum, Union, TypedDict, a dataclass, a date or a path"
            )
        if kind in self._open:
            raise OptionError(f"{place}: the type {_type_name(kind)} holds itself, expected an end; use dict instead")
        self._open.append(kind)
        form = self._of_members(members, read_docstring(kind.__doc__ or "")[1], f"{place}, field ", kind)
        self._open.pop()
        return form

    def _schema_of_model(self, kind: Any) -> dict[str, Any]:
        """A pydantic model's schema; what it refers to is among the definitions, under names of its own if need be."""
        for number in itertools.count():
            prefix = f"{_type_name(kind)}_{number}_" if number else ""
            schema: dict[str, Any] = kind.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
            found = {f"{prefix}{name}": one for name, one in schema.pop("$defs", {}).items()}
            if all(self._definitions.get(name, one) == one for name, one in found.items()):
                break
        self._definitions |= found
        return schema


def _parameters(function: Callable[..., Any], name: str) -> list[Member]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, ValueError, TypeError, SyntaxError) as error:
        raise OptionError(f"{name}: the signature cannot be read: {error}; define its types at module level") from error
    members = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise OptionError(
                f"{name}: parameter '{parameter}' is {parameter.kind.description}, expected named ones only"
            )
        annotation = parameter.annotation
        if parameter.default is None and annotation not in _ANYTHING:
            annotation = annotation | None if isinstance(annotation, type) else typing.Union[annotation, None]  # noqa: UP007
        is_required = parameter.default is MISSING
        members.append(Member(parameter.name, annotation, parameter.default, is_required))
    return members


def _fields(kind: Any) -> list[Member] | None:
    """The members of a dataclass or TypedDict; None for any other type."""
    if hasattr(kind, "__required_keys__"):
        hints = typing.get_type_hints(kind, include_extras=True)
        return [Member(name, hint, MISSING, _is_required_key(kind, name, hint)) for name, hint in hints.items()]
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    members = []
    for field in dataclasses.fields(kind):
        default = MISSING if field.default is dataclasses.MISSING else field.default
        is_required = default is MISSING and field.default_factory is dataclasses.MISSING
        if field.init:
            members.append(Member(field.name, hints[field.name], default, is_required))
    return members


def _is_required_key(kind: Any, name: str, hint: Any) -> bool:
    # Under `from __future__ import annotations` Python counts NotRequired keys among the required ones.
    mark = getattr(typing.get_origin(hint), "_name", None)
    return mark == "Required" or (mark != "NotRequired" and name in kind.__required_keys__)


def _unwrap(annotation: Any) -> tuple[Any, str | None]:
    """A type hint without `Annotated`, `Required`, `NewType` and `type` names around it, and its description."""
    description = None
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            for note in annotation.__metadata__:
                text = note if isinstance(note, str) else getattr(note, "description", None)
                description = description or (text if isinstance(text, str) else None)
            annotation = annotation.__origin__
        elif getattr(origin, "_name", None) in ("Required", "NotRequired", "ReadOnly"):
            annotation = typing.get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return type(None) if annotation is None else annotation, description


def _of_options(origin: Any, args: tuple[Any, ...], place: str) -> Form:
    """The form of a Literal or an Enum; members are given by value, by name where a value is no JSON scalar."""
    if origin is Literal:
        options = {(type(arg), arg): arg for arg in args}
    else:
        by_value = _is_by_value(origin)
        options = {(type(key), key): m for m in origin for key in [m.value if by_value else m.name]}
    values = [key for _, key in options]
    if not all(kind in _SCALARS for kind, _ in options):
        raise OptionError(f"{place} has the options {values}, expected strings, numbers, booleans or None")
    kinds = {_SCALARS[kind][0] for kind, _ in options}

    def read(value: Any, place: str) -> Any:
        if isinstance(value, (list, dict)) or (type(value), value) not in options:
            raise _wrong(place, value, "one of " + ", ".join(map(repr, values)))
        return options[type(value), value]

    return Form({**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": values}, read)


def _is_by_value(kind: type[enum.Enum]) -> bool:
    return all(type(member.value) in _SCALARS for member in kind)


def _read_scalar(kind: Any, value: Any, place: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise _wrong(place, value, _SCALARS[kind][1])
    return value


def _read_text(kind: Any, value: Any, place: str) -> Any:
    try:
        return _TEXT_TYPES[kind][1](_read_scalar(str, value, place))
    except OptionError:
        raise
    except ValueError:
        raise _wrong(place, value, f"a string that is a {_type_name(kind)}") from None


def _read_either(forms: Sequence[Form], value: Any, place: str) -> Any:
    for form in forms:
        with contextlib.suppress(OptionError):
            return form.read(value, place)
    raise _wrong(place, value, "a value of " + json.dumps([form.schema for form in forms], default=repr))


def _read_model(kind: Any, value: Any, place: str) -> Any:
    try:
        return kind.model_validate(value)
    except ValueError as error:  # pydantic's ValidationError is one
        raise OptionError(f"{place} is no {_type_name(kind)}: {error}; correct the argument") from error


def _wrong(place: str, value: object, expected: str) -> OptionError:
    return OptionError(f"{place} is {value!r:.80}, expected {expected}")


def _type_name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))


def _without_z(text: str) -> str:
    # Python 3.10 reads no Z.
    return text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text


def _default(value: Any) -> dict[str, Any]:
    """A default as part of a schema, nothing where it has no JSON form."""
    if isinstance(value, enum.Enum) and not _is_by_value(type(value)):
        value = value.name
    try:
        return {"default": json.loads(json.dumps(value, default=json_form, allow_nan=False))}
    except (TypeError, ValueError):
        return {}


def json_form(value: Any) -> Any:
    """What `json.dumps` writes for a value that is not of a JSON type: for its `default`."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, tuple(_TEXT_TYPES)):
        return value.isoformat() if hasattr(value, "isoformat") else str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
