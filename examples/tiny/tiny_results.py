"""Results of tools, and the answers the model gives from them."""

from __future__ import annotations

import json
from typing import Any

from tiny_words import Words

__all__ = ["answer_results", "make_result"]

_RESULT_KEYS = (
    "temperature temp condition weather humidity wind time date status id name title price amount total count rate "
    "result value sum "
    "city country unit message text translation url path size created updated phone email address distance duration "
    "state level "
    "open available rating author owner number next_run order_id user_id created_at is_open file_size max_temp "
    "min_temp low high"
).split()
_DONE = (
    "ok",
    "OK",
    "done",
    "Done",
    "success",
    "Success",
    "Done.",
    '{"status": "ok"}',
    '{"success": true}',
    '{"ok": true}',
    '{"result": "ok"}',
    "null",
    "",
)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def answer_result(text: str) -> str:
    """The answer the model gives from one tool result."""
    if text in _DONE:
        return "Done."
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, dict):
        if set(value) == {"error"}:
            return f"The tool failed: {value['error']}."
        return " ".join(f"The {key.replace('_', ' ')} is {_plain(item)}." for key, item in value.items())
    if isinstance(value, list):
        return f"The results are {_plain(value)}."
    if text.startswith("Error: "):
        return f"The tool failed: {text[7:]}."
    return f"The result is {_plain(value).replace(chr(10), ', ')}".rstrip(".") + "."


def answer_results(results: list[str]) -> str:
    """The answer the model gives from all tool results of a turn."""
    return " ".join(answer_result(result) for result in results)


def make_result(words: Words) -> str:
    """A tool's result: mostly a JSON object, also text, a list, `ok` or an error."""
    rng = words.rng
    style = rng.random()
    scalars = (
        words.integer,
        words.number,
        words.word,
        words.phrase,
        words.city,
        words.name,
        words.code,
        words.date,
        words.time,
        words.path,
    )
    if style < 0.5:
        keys = dict.fromkeys(
            rng.choice(_RESULT_KEYS) if rng.random() < 0.85 else words.pseudo()
            for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))
        )
        value: Any = {key: rng.choice(scalars)() if rng.random() < 0.93 else rng.choice((True, False)) for key in keys}
        return json.dumps(value, ensure_ascii=False)
    if style < 0.58:
        return json.dumps(
            [rng.choice((words.word, words.path, words.name))() for _ in range(rng.randint(1, 5))],
            ensure_ascii=False,
        )
    if style < 0.66:
        return rng.choice(_DONE)
    if style < 0.71:
        message = rng.choice(
            (
                words.phrase(),
                "not found",
                f"no such file: {words.path()}",
                f"unknown city {words.city()}",
                "timeout",
            )
        )
        return json.dumps({"error": message}, ensure_ascii=False) if rng.random() < 0.6 else f"Error: {message}"
    if style < 0.75:
        return "\n".join(words.path() for _ in range(rng.randint(2, 4)))
    return _result_text(words)


def _result_text(words: Words) -> str:
    rng = words.rng
    number, word, city = words.number(), words.word(), words.city()
    return str(
        rng.choice(
            (
                number,
                number,
                word,
                words.phrase(),
                words.time(),
                words.date(),
                f"{number} degrees",
                f"{number} °C, {word}",
                f"{number}°C",
                f"{word}, {number} degrees",
                f"{number} {rng.choice(('EUR', 'USD', 'km', 'kg', 'minutes', '%'))}",
                f"{word} in {city}",
                f"It is {word} in {city}.",
                f"{city}: {number} degrees, {word}",
                f"{words.phrase().capitalize()}.",
                f"id {words.code()}",
                f"{number} degrees and {word}",
                f"{word.capitalize()}, {number} °C",
                f"Alarm set for {words.time()}",
                f"Message sent to {words.name()}.",
                f"Sunny, {number}°C in {city}",
                f"{word} and {words.word()}",
            )
        )
    )
