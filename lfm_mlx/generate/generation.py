"""`generate` and `stream`: one prompt in, text out as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import mlx.core as mx

from lfm_mlx.errors import OptionError
from lfm_mlx.generate.prompt import Prompt, prompt_ids
from lfm_mlx.model import Model
from lfm_mlx.parsing import StopStrings
from lfm_mlx.sampling import Sampler
from lfm_mlx.step import stepper_of
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import FinishReason, SamplingParams, Tool, check_integer


@dataclass(frozen=True, kw_only=True)
class Token:
    """One step of a stream.

    Args:
        id: the token that was drawn.
        text: what may be shown now; "" while characters or possible stop strings are incomplete.
        finish_reason: set on the last one: "stop" (a stop token or string), "length" or "cancelled".
    """

    id: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a generation took; times in seconds, memory in bytes."""

    prompt_tokens: int
    generated_tokens: int
    prompt_s: float
    generation_s: float
    peak_memory_bytes: int
    finish_reason: FinishReason | None
    seed: int | None

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens a second, up to the first token drawn."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def generated_tokens_per_s(self) -> float:
        """Tokens a second after the first one."""
        return (self.generated_tokens - 1) / self.generation_s if self.generation_s else 0.0


class TokenStream(Iterator[Token]):
    """Iterate for tokens; `cancel` from any thread; `statistics` is up to date at any time."""

    def __init__(self, model: Model, tokenizer: Tokenizer, ids: Sequence[int], options: _Options) -> None:
        self.prompt_tokens = len(ids)
        self.generated_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._sampler = Sampler([options.sampling], model.config.vocab_size)
        self._is_cancelled = False
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = self._started_s
        self._tokens = self._run(model, tokenizer, ids, options)

    def __next__(self) -> Token:
        return next(self._tokens)

    def cancel(self) -> None:
        """End the stream after the token or prompt chunk that is being computed."""
        self._is_cancelled = True

    @property
    def statistics(self) -> Statistics:
        """What it took so far."""
        first_s = self._first_s or self._last_s
        return Statistics(
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.generated_ids),
            prompt_s=first_s - self._started_s,
            generation_s=self._last_s - first_s,
            peak_memory_bytes=mx.get_peak_memory(),
            finish_reason=self.finish_reason,
            seed=self._sampler.params[0].seed,
        )

    def _run(self, model: Model, tokenizer: Tokenizer, ids: Sequence[int], options: _Options) -> Iterator[Token]:
        detokenizer = tokenizer.detokenizer(skip_special=options.skip_special)
        stops = StopStrings(options.stop)
        for token_id in self._ids(model, ids, options.max_tokens):
            self.generated_ids.append(token_id)
            is_stop = token_id in tokenizer.stop_ids and not options.ignore_stop_tokens
            text = stops.add("" if is_stop else detokenizer.add(token_id))
            if is_stop or stops.is_found:
                self.finish_reason = "stop"
            elif self._is_cancelled:
                self.finish_reason = "cancelled"
            elif len(self.generated_ids) == options.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                text += stops.add(detokenizer.finish()) + stops.finish()
                yield Token(id=token_id, text=text, finish_reason=self.finish_reason)
                return
            yield Token(id=token_id, text=text)
        self.finish_reason = "cancelled"

    def _ids(self, model: Model, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Token ids, each step queued on the device before the previous token is looked at."""
        stepper, state = stepper_of(model), model.new_state()
        sampler, sampler_state = self._sampler, self._sampler.start([prompt])
        logits = mx.array([])
        for chunk_logits in stepper.prefill_chunks(state, mx.array([prompt], dtype=mx.int32)):
            self._last_s = time.perf_counter()
            if self._is_cancelled:
                return
            logits = chunk_logits if chunk_logits is not None else logits
        ids, sampler_state = sampler.sample(logits, sampler_state)
        mx.async_eval(ids, sampler_state)
        for count in range(1, max_tokens + 1):
            current = ids
            if count < max_tokens:
                step = stepper.decode_and_sample(state, current, sampler, sampler_state)
                ids, sampler_state = step.ids, step.sampler_state
                mx.async_eval(ids, sampler_state, state.arrays)
            token_id = current.item()
            assert isinstance(token_id, int)
            self._last_s = time.perf_counter()
            self._first_s = self._first_s or self._last_s
            yield token_id


@dataclass(frozen=True, kw_only=True)
class _Options:
    sampling: SamplingParams
    max_tokens: int
    stop: Sequence[str]
    skip_special: bool
    ignore_stop_tokens: bool


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: str | Sequence[str] = (),
    system: str | None = None,
    tools: Sequence[Tool] | None = None,
    raw: bool = False,
    template_variables: Mapping[str, Any] | None = None,
    skip_special: bool = False,
    ignore_stop_tokens: bool = False,
    **overrides: Any,
) -> TokenStream:
    """Generate, token by token.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt: text (one user message, through the chat template), a list of messages, or token ids.
        max_tokens: at most so many tokens are drawn; None lets the answer use the rest of the context.
        sampling: how tokens are drawn; None takes the values of the model's card.
        stop: strings that end the answer; they are not part of it.
        system: a system message in front of `prompt`.
        tools: tools that the template shows the model.
        raw: take a text prompt as it is, without template.
        template_variables: further variables for the template.
        skip_special: leave special tokens' text out.
        ignore_stop_tokens: go on after a stop token, for measurements.
        **overrides: single fields of `SamplingParams` (temperature, top_k, ... seed) that win over `sampling`.

    Returns:
        An iterator of `Token`; its `cancel` may be called from another thread, its `statistics` at any time.

    Raises:
        OptionError: an option is unknown or refused.
        ContextLengthError: the prompt leaves no room.
        TemplateError: the messages cannot be rendered.
    """
    ids = prompt_ids(
        model, tokenizer, prompt, system=system, tools=tools, raw=raw, template_variables=template_variables
    )
    room = model.config.max_context - len(ids)
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, minimum=1)
    options = _Options(
        sampling=with_overrides(sampling or model.sampling, overrides),
        max_tokens=min(max_tokens or room, room),
        stop=[stop] if isinstance(stop, str) else list(stop),
        skip_special=skip_special,
        ignore_stop_tokens=ignore_stop_tokens,
    )
    StopStrings(options.stop)
    return TokenStream(model, tokenizer, ids, options)


def generate(model: Model, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """The whole answer as text; arguments and errors are those of `stream`."""
    return "".join([token.text for token in stream(model, tokenizer, prompt, **options)])


def with_overrides(sampling: SamplingParams, overrides: Mapping[str, Any]) -> SamplingParams:
    """`sampling` with single fields replaced; unknown names are refused with the nearest known one."""
    known = [field.name for field in fields(SamplingParams)]
    for name in overrides:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f", expected one of {', '.join(known)}"
            raise OptionError(f"unknown option {name}{hint}")
    return replace(sampling, **overrides)
