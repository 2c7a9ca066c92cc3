"""`generate` and `stream`: one prompt in, text out as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import mlx.core as mx

from lfm_mlx.distributed import free_bytes
from lfm_mlx.engine import Engine, Request, Row
from lfm_mlx.errors import OptionError
from lfm_mlx.generate.prompt import Prompt, prompt_ids
from lfm_mlx.memory import room_for_answer
from lfm_mlx.model import Model
from lfm_mlx.parsing import StopStrings
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
    """Iterate for tokens; `cancel` from any thread; `statistics` is up to date at any time.

    A stream that is given up before its end frees what it holds on the device as soon as nobody refers to it.
    """

    def __init__(self, engine: Engine, row: Row, tokenizer: Tokenizer, stops: StopStrings, skip_special: bool) -> None:
        self._engine: Engine | None = engine
        self._row = row
        self._stops = stops
        self._detokenizer = tokenizer.detokenizer(skip_special=skip_special)
        self._num_taken = 0
        self._finish_reason: FinishReason | None = None

    def __next__(self) -> Token:
        row = self._row
        while self._engine is not None and len(row.generated) == self._num_taken and row.finish_reason is None:
            self._engine.step()
        if len(row.generated) == self._num_taken or self._engine is None:
            self._end(row.finish_reason)
            if row.error is not None:
                raise row.error
            raise StopIteration
        token_id = row.generated[self._num_taken]
        self._num_taken += 1
        is_stop = row.finish_reason == "stop"
        text = self._stops.add("" if is_stop else self._detokenizer.add(token_id))
        finish_reason: FinishReason | None = "stop" if self._stops.is_found else row.finish_reason
        if finish_reason is not None:
            text += self._stops.add(self._detokenizer.finish()) + self._stops.finish()
            self._end(finish_reason)
        return Token(id=token_id, text=text, finish_reason=finish_reason)

    def cancel(self) -> None:
        """End the stream after the token or prompt chunk that is being computed."""
        self._row.cancel()

    def _end(self, finish_reason: FinishReason | None) -> None:
        self._finish_reason = self._finish_reason or finish_reason
        self._engine = None  # Its caches are freed now, not when the caller drops the stream.

    @property
    def generated_ids(self) -> list[int]:
        """The tokens drawn so far, a stop token included."""
        return self._row.generated[: self._num_taken]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the stream ended; None while it goes on."""
        return self._finish_reason

    @property
    def statistics(self) -> Statistics:
        """What it took so far."""
        row = self._row
        first_s = row.first_s or row.last_s
        return Statistics(
            prompt_tokens=len(row.request.prompt),
            generated_tokens=self._num_taken,
            prompt_s=first_s - row.started_s,
            generation_s=row.last_s - first_s,
            peak_memory_bytes=mx.get_peak_memory(),
            finish_reason=self._finish_reason,
            seed=row.seed,
        )


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
    kv_bits: int | None = None,
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
        kv_bits: 8 or 4 to quantise keys and values; None takes what `load` was given.
        **overrides: single fields of `SamplingParams` (temperature, top_k, ... seed) that win over `sampling`.

    Returns:
        An iterator of `Token`; its `cancel` may be called from another thread, its `statistics` at any time.

    Raises:
        OptionError: an option is unknown or refused.
        ContextLengthError: the prompt leaves no room.
        MemoryPlanError: prompt and answer need more memory than is free.
        TemplateError: the messages cannot be rendered.
    """
    check_options(max_tokens=max_tokens, stop=stop, **overrides)
    ids = prompt_ids(
        model, tokenizer, prompt, system=system, tools=tools, raw=raw, template_variables=template_variables
    )
    engine = Engine(model, kv_bits=kv_bits)
    request = Request(
        prompt=ids,
        sampling=with_overrides(sampling or model.sampling, overrides),
        max_tokens=room_for_answer(model, len(ids), max_tokens, kv_bits=engine.kv_bits, free_bytes=free_bytes(model)),
        stop_ids=frozenset() if ignore_stop_tokens else tokenizer.stop_ids,
    )
    return TokenStream(engine, engine.submit(request), tokenizer, StopStrings(stop), skip_special)


def generate(model: Model, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """The whole answer as text; arguments and errors are those of `stream`."""
    return "".join([token.text for token in stream(model, tokenizer, prompt, **options)])


def check_options(*, max_tokens: int | None = None, stop: str | Sequence[str] = (), **overrides: Any) -> None:
    """Refuse the options that `stream` would refuse, while there is no model yet.

    Raises:
        OptionError: an option is unknown or refused.
    """
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, minimum=1)
    StopStrings(stop)
    with_overrides(SamplingParams(), overrides)


def with_overrides(sampling: SamplingParams, overrides: Mapping[str, Any]) -> SamplingParams:
    """`sampling` with single fields replaced; unknown names are refused with the nearest known one."""
    known = [*SamplingParams.names(), *(stream.__kwdefaults__ or {})]
    for name in overrides:
        if name not in SamplingParams.names():
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f", expected one of {', '.join(known)}"
            raise OptionError(f"unknown option {name}{hint}")
    return replace(sampling, **overrides)
