"""What the rows of a batch ask for: arrays of options, and the features that decide which operations run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.errors import OptionError
from lfm_mlx.types import SamplingParams

Parameters = dict[str, mx.array]
"""The options of the rows as arrays, by name, rows on the first axis; only those that a feature reads."""

LOWEST_TEMPERATURE = 1e-5
"""Temperatures below are greedy, as in vLLM: logits divided by them would leave float32."""

LARGEST_SHIFT = 1e20
"""Biases, presence and frequency penalties are cut to this size, far beyond any logit, to keep scores finite."""

LARGEST_FACTOR = 1e10
"""Temperatures and repetition penalties are cut to this and its inverse, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which operations a batch needs: the static part of a sampler, and with B and V the key of its graph.

    Args:
        is_random: a row has a temperature.
        is_mixed: and another is greedy.
        max_top_k: the largest top_k of a row with a temperature, 0 if none cuts.
        has_top_p, has_min_p: a row with a temperature uses it.
        has_logit_bias, has_repetition, has_presence, has_frequency: a row uses it.
        max_window: the longest finite window of a row with a penalty, 0 if there is none.
    """

    is_random: bool = False
    is_mixed: bool = False
    max_top_k: int = 0
    has_top_p: bool = False
    has_min_p: bool = False
    has_logit_bias: bool = False
    has_repetition: bool = False
    has_presence: bool = False
    has_frequency: bool = False
    max_window: int = 0

    @property
    def counts_answer(self) -> bool:
        """Whether generated tokens are counted."""
        return self.has_presence or self.has_frequency

    @property
    def has_penalty(self) -> bool:
        """Whether any token is counted."""
        return self.has_repetition or self.counts_answer


def find_features(params: Sequence[SamplingParams], vocab_size: int) -> Features:
    """The features that at least one row has an effect from."""
    random = [one for one in params if not is_greedy(one)]
    return Features(
        is_random=bool(random),
        is_mixed=0 < len(random) < len(params),
        max_top_k=max((effective_top_k(one, vocab_size) for one in random), default=0),
        has_top_p=any(one.top_p < 1 for one in random),
        has_min_p=any(one.min_p > 0 for one in random),
        has_logit_bias=any(one.logit_bias for one in params),
        has_repetition=any(one.repetition_penalty != 1 for one in params),
        has_presence=any(one.presence_penalty != 0 for one in params),
        has_frequency=any(one.frequency_penalty != 0 for one in params),
        max_window=max(effective_window(one) for one in params),
    )


def parameter_arrays(params: Sequence[SamplingParams], features: Features, vocab_size: int) -> Parameters:
    """The arrays that the operations of `features` read."""
    arrays: Parameters = {}
    if features.is_random:
        arrays["temperature"] = mx.array([1.0 if is_greedy(one) else cut_factor(one.temperature) for one in params])
    if features.is_mixed:
        arrays["is_greedy"] = mx.array([is_greedy(one) for one in params])
    if features.max_top_k:
        arrays["top_k"] = mx.array([effective_top_k(one, vocab_size) for one in params], dtype=mx.int32)
    if features.has_top_p:
        arrays["tail"] = mx.array([1.0 - one.top_p for one in params])
    if features.has_min_p:
        arrays["log_min_p"] = mx.array([math.log(one.min_p) if one.min_p > 0 else -math.inf for one in params])
    if features.has_logit_bias:
        arrays["bias"] = dense_bias(params, vocab_size)
    if features.has_repetition:
        arrays["repetition"] = mx.array([cut_factor(one.repetition_penalty) for one in params])
    if features.has_presence:
        arrays["presence"] = mx.array([cut_shift(one.presence_penalty) for one in params])
    if features.has_frequency:
        arrays["frequency"] = mx.array([cut_shift(one.frequency_penalty) for one in params])
    if features.has_penalty:
        arrays["rows"] = mx.array(list(range(len(params))), dtype=mx.uint32)
    if features.max_window:
        arrays["window"] = mx.array([effective_window(one) for one in params], dtype=mx.uint32)
    return arrays


def is_greedy(params: SamplingParams) -> bool:
    """Whether the row takes the likeliest token."""
    return params.temperature < LOWEST_TEMPERATURE


def effective_top_k(params: SamplingParams, vocab_size: int) -> int:
    """top_k, or 0 where it cuts nothing: a greedy row, or one that keeps the whole vocabulary."""
    return 0 if is_greedy(params) or params.top_k >= vocab_size else params.top_k


def effective_window(params: SamplingParams) -> int:
    """The length of a finite penalty window; 0 where all tokens count or no penalty is on."""
    is_penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return (params.penalty_window or 0) if is_penalised else 0


def dense_bias(params: Sequence[SamplingParams], vocab_size: int) -> mx.array:
    """The logit biases of all rows: (B, V) float32."""
    entries = [
        (row, token, cut_shift(bias))
        for row, one in enumerate(params)
        for token, bias in (one.logit_bias or {}).items()
    ]
    rows, tokens, values = zip(*entries, strict=True)
    zeros = mx.zeros((len(params), vocab_size))
    return zeros.at[mx.array(rows), mx.array(tokens)].add(mx.array(values))


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise OptionError if logit_bias names a token that does not exist."""
    largest = max(params.logit_bias or {0: 0.0})
    if largest >= vocab_size:
        raise OptionError(
            f"logit_bias has token id {largest}, expected ids from 0 to {vocab_size - 1}; "
            "take the ids from this model's tokenizer"
        )


def cut_shift(value: float) -> float:
    """`value` within plus and minus `LARGEST_SHIFT`."""
    return min(max(float(value), -LARGEST_SHIFT), LARGEST_SHIFT)


def cut_factor(value: float) -> float:
    """`value` within `LARGEST_FACTOR` and its inverse."""
    return min(max(float(value), 1 / LARGEST_FACTOR), LARGEST_FACTOR)
