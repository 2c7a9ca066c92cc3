"""Tools of the synthetic conversations: requests that need them and the calls that answer."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

from tiny_families import Arg, Family
from tiny_words import ARG_NAMES, Words

__all__ = ["Call", "Request", "Tool", "literal"]

_OPEN = ("Please", "Can you", "Could you", "Hey,", "Now", "I want you to", "Would you", "please", "can you")
_COMMANDS = (
    "ls {}",
    "ls -la {}",
    "cat {}.txt",
    "grep -n {} {}.py",
    "git status",
    "git log",
    "echo {}",
    "mkdir {}",
    "python {}.py",
    "make {}",
    "rm -r {}",
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool, its arguments in the order of the schema."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user says and the call it asks for."""

    text: str
    call: Call


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool as the model sees it, and what is needed to ask for it."""

    key: str
    schema: dict[str, Any]
    name: str
    args: tuple[Arg, ...]
    arg_names: tuple[str, ...]
    family: Family | None = None
    verb: str = ""
    thing: str = ""
    required: tuple[str, ...] = field(default=())

    def request(self, words: Words) -> Request:
        """A request whose one right answer is a call of this tool."""
        return _ask_family(self, words) if self.family else _ask_generic(self, words)

    def follow_up(self, words: Words) -> Request | None:
        """A short question such as `And in Rome?` that repeats the call with another first argument."""
        if not self.family or not self.family.follow_ups or len([arg for arg in self.args if arg.required]) != 1:
            return None
        value = _value(words, self.args[0])
        text = words.rng.choice(self.family.follow_ups).format(value)
        return Request(text=text, call=Call(name=self.name, arguments={self.arg_names[0]: value}))

    def pair(self, words: Words) -> tuple[str, list[Call]] | None:
        """One question about two values, such as `the weather in Paris and Rome`, and its two calls."""
        if not self.family or not self.family.follow_ups or self.args[0].kind not in ("city", "word", "code", "path"):
            return None
        first, second = _value(words, self.args[0]), _value(words, self.args[0])
        asks = [ask for ask in self.family.asks if "{1}" not in ask]
        joined = words.rng.choice(
            (
                f"{first} and {second}",
                f"{first} and in {second}" if self.args[0].kind == "city" else f"{first} and {second}",
            )
        )
        calls = [Call(name=self.name, arguments={self.arg_names[0]: value}) for value in (first, second)]
        return words.rng.choice(asks).format(joined), calls


def literal(value: Any) -> str:
    """`value` as the Python literal the model writes, strings in double quotes."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    return str(value)


def _value(words: Words, arg: Arg) -> Any:
    rng = words.rng
    makers: dict[str, Any] = {
        "city": words.city,
        "word": words.word,
        "time": words.time,
        "name": words.name,
        "email": words.email,
        "path": words.path,
        "code": words.code,
        "date": words.date,
        "url": words.url,
        "capital": words.capital,
        "number": words.number,
        "integer": words.integer,
        "small": lambda: rng.randint(1, rng.choice((9, 60, 100))),
        "amount": lambda: rng.choice(
            (rng.randint(1, 99), rng.randint(1, 9999), round(rng.uniform(0, 100), 1), round(rng.uniform(0, 1000), 2))
        ),
        "enum": lambda: rng.choice(arg.enum),
        "choice": lambda: rng.choice(arg.enum),
        "boolean": lambda: rng.random() < 0.5,
        "text": lambda: words.word() if rng.random() < 0.3 else words.phrase(),
        "digits": lambda: str(rng.randint(0, 10 ** rng.randint(1, 6))),
        "words": lambda: [words.word() for _ in range(rng.randint(1, 4))],
        "integers": lambda: [rng.randint(0, 99) for _ in range(rng.randint(1, 4))],
        "object": lambda: {
            rng.choice(ARG_NAMES): rng.choice((words.word, words.integer))() for _ in range(rng.randint(1, 2))
        },
        "command": lambda: rng.choice(_COMMANDS).format(words.pseudo(), words.pseudo()),
    }
    return makers[arg.kind]()


def _spoken(words: Words, value: Any, quote: bool) -> str:
    rng = words.rng
    if isinstance(value, bool):
        return rng.choice(("true", "true", "yes", "True")) if value else rng.choice(("false", "false", "no", "False"))
    if isinstance(value, list):
        items = [str(item) for item in value]
        return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and quote:
        mark = '"' if "'" in value else rng.choice('\'""')
        return f"{mark}{value}{mark}"
    return str(value)


def _polite(text: str, rng: random.Random) -> str:
    """Sometimes dress an order in politeness."""
    first = text.split(" ", 1)[0]
    if rng.random() > 0.14 or not text.endswith(".") or not first.isalpha() or first == "I":
        return text
    opening = rng.choice(_OPEN)
    body = text[0].lower() + text[1:]
    return (
        f"{opening} {body[:-1]}?" if opening.lower() in ("can you", "could you", "would you") else f"{opening} {body}"
    )


def _ask_family(tool: Tool, words: Words) -> Request:
    rng = words.rng
    assert tool.family is not None
    ask = rng.choice(tool.family.asks)
    values = {index: _value(words, arg) for index, arg in enumerate(tool.args) if f"{{{index}}}" in ask}
    spoken = {}
    for index, value in values.items():
        kind = tool.args[index].kind
        quote = kind in ("text", "path", "command", "word", "code") and rng.random() < (
            0.35 if kind in ("text", "command") else 0.1
        )
        spoken[index] = _spoken(words, value, quote)
    for index in spoken:
        ask = ask.replace(f"{{{index}}}", f"\0{index}\0").replace(
            f"{{{index}name}}", tool.arg_names[index].replace("_", " ")
        )
    for index, text in spoken.items():
        ask = ask.replace(f"\0{index}\0", text)
    arguments = {
        tool.arg_names[index]: values[index]
        for index in sorted(values, key=lambda i: list(_properties(tool)).index(tool.arg_names[i]))
    }
    return Request(text=_polite(ask, rng), call=Call(name=tool.name, arguments=arguments))


def _properties(tool: Tool) -> dict[str, Any]:
    function = tool.schema.get("function", tool.schema)
    return dict(function["parameters"].get("properties", {}))


def _ask_generic(tool: Tool, words: Words) -> Request:
    rng = words.rng
    chosen = [i for i, name in enumerate(tool.arg_names) if name in tool.required or rng.random() < 0.6]
    values = {i: _value(words, tool.args[i]) for i in chosen}
    order = chosen[:]
    if rng.random() < 0.2:
        rng.shuffle(order)
    raw = rng.random() < 0.4
    link = rng.choice((" ", " ", " ", " = ", ": ", "="))
    parts = []
    for i in order:
        name = (
            tool.arg_names[i]
            if raw
            else re.sub(r"([a-z])([A-Z])", r"\1 \2", tool.arg_names[i]).replace("_", " ").lower()
        )
        quote = isinstance(values[i], str) and rng.random() < (0.7 if " " in values[i] else 0.15)
        parts.append(name + link + _spoken(words, values[i], quote))
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""
    head = rng.choice(
        (
            f"{tool.verb} the {tool.thing}",
            f"{tool.verb} the {tool.thing}",
            f"{tool.verb} a {tool.thing}",
            f"use {tool.name}",
            f"call {tool.name}",
        )
    )
    head = head[0].upper() + head[1:]
    text = head + (rng.choice((" with ", " with ", ": ", " using ")) + listed if listed else "") + "."
    return Request(
        text=_polite(text, rng),
        call=Call(name=tool.name, arguments={tool.arg_names[i]: values[i] for i in chosen}),
    )
