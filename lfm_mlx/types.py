"""Small frozen values that several layers share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lfm_mlx.errors import OptionError

Message = Mapping[str, Any]
"""One chat message: ``role``, ``content`` and whatever else the template reads."""

Tool = Mapping[str, Any]
"""One tool in OpenAI's form or as a bare function object (name, description, parameters)."""

FinishReason = Literal["stop", "length", "cancelled", "repetition", "time_limit", "error"]
"""Why a generation ended: a stop token or string, ``max_tokens`` or the context, the caller, the loop guard, its time
limit, or an error that concerns it alone."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool that can be executed.

    Args:
        id: distinct for every call, "call_" and 24 characters.
        name: the function, as the model wrote it.
        arguments: JSON values by argument name.
        text: what the model wrote for this call.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    text: str = ""

    @property
    def arguments_json(self) -> str:
        """The arguments as an OpenAI client receives them: the text of a JSON object."""
        return json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class CallError:
    """One call that the model wrote and that must not be executed.

    Args:
        code: the kind of error in one word, such as "not_literal" or "unknown_function"; for programs.
        message: what was found and what was expected; for people, and for the model to try again.
        text: what the model wrote for this call; it stands in the content too.
        name: the function, where it could be read.
        arguments: the arguments, where they could be read and only the tool's schema refused them.
    """

    code: str
    message: str
    text: str
    name: str | None = None
    arguments: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ReasoningDelta:
    """A further piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ContentDelta:
    """A further piece of the answer itself."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ToolCallDone:
    """The model wrote a call, whole and checked."""

    call: ToolCall


@dataclass(frozen=True, kw_only=True)
class ToolCallFailed:
    """The model wrote a call that cannot be executed; its text has just come as content."""

    error: CallError


OutputEvent = ReasoningDelta | ContentDelta | ToolCallDone | ToolCallFailed
"""What an answer consists of, in the order in which the model wrote it."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Every field is checked when the value is made.

    Args:
        temperature: 0 is greedy; higher flattens the distribution. At least 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probabilities sum to at least this, in (0, 1].
        min_p: drop tokens less likely than this share of the likeliest one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in the window, the
            prompt's tokens included; above 0, 1 is off.
        presence_penalty: subtracted once from the logit of a token that was generated in the window.
        frequency_penalty: subtracted for each time the token was generated in the window.
        penalty_window: how many of the latest tokens (prompt and answer) the penalties look at, at least 1;
            None looks at all of them, as transformers and vLLM do.
        logit_bias: token id -> number added to its logit.
        seed: makes sampling repeatable; None draws a fresh one.

    Raises:
        OptionError: a value is of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, minimum=0)
        check_integer("top_k", self.top_k, minimum=0)
        check_number("top_p", self.top_p, minimum=0, maximum=1, minimum_excluded=True)
        check_number("min_p", self.min_p, minimum=0, maximum=1)
        check_number("repetition_penalty", self.repetition_penalty, minimum=0, minimum_excluded=True)
        check_number("presence_penalty", self.presence_penalty)
        check_number("frequency_penalty", self.frequency_penalty)
        if self.penalty_window is not None:
            check_integer("penalty_window", self.penalty_window, minimum=1)
        if self.seed is not None:
            check_integer("seed", self.seed, minimum=0, maximum=2**64 - 1)
        for token, bias in (self.logit_bias or {}).items():
            check_integer("logit_bias: token id", token, minimum=0)
            check_number(f"logit_bias[{token}]", bias)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields, in order."""
        return tuple(f.name for f in fields(cls))


def check_number(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    minimum_excluded: bool = False,
) -> None:
    """Raise OptionError unless `value` is a finite number within the given range."""
    expected = "a finite number" + _range_text(minimum, maximum, minimum_excluded)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise OptionError(f"{name} is {value!r}, expected {expected}")
    _check_range(name, float(value), expected, minimum, maximum, minimum_excluded)  # type: ignore[arg-type]


def check_integer(name: str, value: object, *, minimum: int | None = None, maximum: int | None = None) -> None:
    """Raise OptionError unless `value` is a whole number within the given range."""
    expected = "a whole number" + _range_text(minimum, maximum, False)
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}, expected {expected}")
    _check_range(name, value, expected, minimum, maximum, False)


def _check_range(
    name: str,
    value: float,
    expected: str,
    minimum: float | None,
    maximum: float | None,
    minimum_excluded: bool,
) -> None:
    too_small = minimum is not None and (value < minimum or (minimum_excluded and value == minimum))
    if too_small or (maximum is not None and value > maximum):
        raise OptionError(f"{name} is {value!r}, expected {expected}")


def _range_text(minimum: float | None, maximum: float | None, minimum_excluded: bool) -> str:
    low = "" if minimum is None else (f" above {minimum}" if minimum_excluded else f" of at least {minimum}")
    high = "" if maximum is None else f" {'and' if low else 'of'} at most {maximum}"
    return low + high
