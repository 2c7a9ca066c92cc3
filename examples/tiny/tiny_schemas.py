"""Schemas of the synthetic conversations' tools: natural families and generic verb-and-thing tools."""

from __future__ import annotations

import random
import re
from typing import Any

from tiny_families import FAMILIES, Arg, Family
from tiny_tools import Tool
from tiny_words import ARG_NAMES, Words

__all__ = ["family_tool", "make_tool"]

_VERBS = (
    "create update delete get find list check start stop send show add remove open close move copy rename merge "
    "split "
    "count print load save export import archive restore enable disable reset assign approve reject cancel confirm "
    "schedule publish upload download scan sort filter compare inspect validate register book order pay refund track "
    "sync build deploy test review pin lock unlock share invite block rate tag"
).split()
_THINGS = (
    "invoice account customer ticket order report file folder project task user group product payment booking device "
    "server sensor camera door window robot drone vehicle car bike route trip hotel room seat flight package "
    "shipment "
    "warehouse shelf item cart coupon card loan budget contract lease policy claim patient doctor visit lab sample "
    "test "
    "recipe meal menu table course lesson exam student teacher class book page chapter note photo album video song "
    "playlist channel post comment thread message mail contact calendar event meeting reminder alarm timer label "
    "branch "
    "commit issue release build job queue worker database record row column index backup snapshot volume network "
    "port "
    "domain certificate key token session profile badge team league match score survey vote"
).split()
_MODIFIERS = (
    "start end new old max min first last user order item file customer project target source due total home main sub"
).split()
_TAILS = "id name type code date time count size list number label path key url level ref".split()
_BOOLEANS = {"enabled", "active", "public", "urgent", "verbose", "force", "recursive"}
_INTEGERS = {
    "count",
    "limit",
    "offset",
    "page",
    "quantity",
    "days",
    "hours",
    "year",
    "port",
    "size",
    "width",
    "height",
    "rank",
    "level",
    "floor",
    "number",
}
_NUMBERS = {"price", "cost", "amount", "total", "rate", "score", "weight", "depth", "length", "duration", "value"}
_ARRAYS = {"items", "tags", "ids", "list", "members"}
_OBJECTS = {"options", "settings", "data"}


def _arg_name(words: Words) -> str:
    rng = words.rng
    style = rng.random()
    base = rng.choice(ARG_NAMES)
    if style < 0.5:
        return base
    if style < 0.65:
        return words.pseudo()
    pair = (rng.choice(_MODIFIERS), base) if style < 0.8 else (rng.choice(_THINGS), rng.choice(_TAILS))
    return pair[0] + pair[1].capitalize() if rng.random() < 0.25 else f"{pair[0]}_{pair[1]}"


def _generic_arg(name: str, words: Words) -> Arg:
    rng = words.rng
    tail = re.split(r"_|(?=[A-Z])", name)[-1].lower()
    if tail in _BOOLEANS:
        type_, kind = "boolean", "boolean"
    elif tail in _INTEGERS:
        type_, kind = "integer", "integer"
    elif tail in _NUMBERS:
        type_, kind = "number", "number"
    elif tail in _ARRAYS:
        type_, kind = "array", rng.choice(("words", "words", "integers"))
    elif tail in _OBJECTS:
        type_, kind = "object", "object"
    else:
        type_, kind = (
            "string",
            rng.choice(
                (
                    "word",
                    "word",
                    "name",
                    "code",
                    "text",
                    "city",
                    "date",
                    "time",
                    "path",
                    "email",
                    "digits",
                    "enum",
                    "url",
                )
            ),
        )
        if rng.random() < 0.12:
            type_, kind = rng.choice((("integer", "integer"), ("number", "number"), ("boolean", "boolean")))
    enum = tuple(dict.fromkeys(words.word() for _ in range(rng.randint(2, 4)))) if kind == "enum" else ()
    thing = name.replace("_", " ")
    descriptions = (
        f"The {thing}.",
        f"{thing.capitalize()}",
        f"{thing.capitalize()} to use.",
        f"{rng.choice(('Set', 'Choose', 'Give'))} the {thing}.",
    )
    return Arg(names=(name,), type=type_, kind=kind, descriptions=descriptions, enum=enum, required=rng.random() < 0.7)


def _schema(
    name: str, description: str, names: list[str], args: list[Arg], required: list[str], rng: random.Random
) -> dict[str, Any]:
    described = rng.random() < 0.4
    properties: dict[str, Any] = {}
    for arg_name, arg in zip(names, args, strict=True):
        entry: dict[str, Any] = {"type": arg.type}
        if arg.type == "array" and rng.random() < 0.8:
            entry["items"] = {"type": "integer" if arg.kind == "integers" else "string"}
        if described and rng.random() < 0.85:
            entry["description"] = rng.choice(arg.descriptions)
        if arg.kind == "enum" or (arg.enum and rng.random() < 0.25):
            entry["enum"] = list(arg.enum)
        if rng.random() < 0.08:
            entry = dict(sorted(entry.items()))
        properties[arg_name] = entry
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required or rng.random() < 0.5:
        parameters["required"] = required
    if rng.random() < 0.06:
        parameters["additionalProperties"] = False
    if rng.random() < 0.08:
        parameters = dict(sorted(parameters.items()))
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if rng.random() < 0.06:
        del function["description"]
    if rng.random() < 0.08:
        function = dict(sorted(function.items()))
    return function


def _wrapped(function: dict[str, Any], wrap: bool) -> dict[str, Any]:
    return {"type": "function", "function": function} if wrap else function


def make_tool(words: Words, wrap: bool, small: bool = False) -> Tool:
    """A random tool, natural or generic, its schema in OpenAI's wrapper or bare; `small` keeps it short."""
    rng = words.rng
    if rng.random() < 0.6:
        return family_tool(rng.choice(FAMILIES), words, wrap)
    verb, thing = rng.choice(_VERBS), rng.choice(_THINGS) if rng.random() < 0.8 else words.pseudo()
    style = rng.random()
    if style < 0.55:
        name = f"{verb}_{thing}"
    elif style < 0.7:
        name = verb + thing.capitalize()
    elif style < 0.8:
        name = f"{thing}.{verb}"
    else:
        name = words.pseudo() if rng.random() < 0.6 else f"{words.pseudo()}_{words.pseudo()}"
    names = list(
        dict.fromkeys(
            _arg_name(words) for _ in range(rng.choice((0, 1, 1, 2)) if small else rng.choice((1, 1, 1, 2, 2, 3, 4)))
        )
    )
    args = [_generic_arg(arg, words) for arg in names]
    required = [arg_name for arg_name, arg in zip(names, args, strict=True) if arg.required]
    description = rng.choice(
        (
            f"{verb.capitalize()} the {thing}.",
            f"{verb.capitalize()} a {thing}.",
            f"{verb.capitalize()}s a {thing}",
            f"Use this to {verb} the {thing}.",
        )
    )
    schema = _schema(name, description, names, args, required, rng)
    if "description" not in schema and style >= 0.8:
        schema["description"] = description
    return Tool(
        key=f"{verb} {thing}",
        schema=_wrapped(schema, wrap),
        name=name,
        args=tuple(args),
        arg_names=tuple(names),
        verb=verb,
        thing=thing,
        required=tuple(required),
    )


def family_tool(family: Family, words: Words, wrap: bool) -> Tool:
    """A tool of `family` with names and descriptions drawn from its lists."""
    rng = words.rng
    args = [arg for arg in family.args if arg.required or rng.random() < 0.6]
    # A wording that needs a left-out optional argument must not be used: keep arguments that precede, drop the rest.
    asks = tuple(
        ask
        for ask in family.asks
        if all(f"{{{i}}}" not in ask for i in range(len(family.args)) if family.args[i] not in args)
    )
    index = {i: args.index(arg) for i, arg in enumerate(family.args) if arg in args}
    assert all(old == new for old, new in index.items()), family.key
    names: list[str] = []
    for arg in args:
        free = [name for name in arg.names if name not in names]
        names.append(arg.names[0] if arg.names[0] in free and rng.random() < 0.35 else rng.choice(free))
    required = [name for name, arg in zip(names, args, strict=True) if arg.required]
    order = list(range(len(args)))
    if rng.random() < 0.15:
        rng.shuffle(order)
    name = family.names[0] if rng.random() < 0.25 else rng.choice(family.names)
    schema = _schema(
        name, rng.choice(family.descriptions), [names[i] for i in order], [args[i] for i in order], required, rng
    )
    chosen = Family(
        key=family.key,
        names=family.names,
        descriptions=family.descriptions,
        args=tuple(args),
        asks=asks,
        missing=family.missing,
        follow_ups=family.follow_ups,
    )
    return Tool(
        key=family.key,
        schema=_wrapped(schema, wrap),
        name=name,
        args=tuple(args),
        arg_names=tuple(names),
        family=chosen,
        required=tuple(required),
    )
