"""What is asked of the engine for one row, and what has become of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from lfm_mlx.cache import Transcript
from lfm_mlx.errors import OptionError
from lfm_mlx.sampling import check_bias, fresh_seed
from lfm_mlx.types import FinishReason, SamplingParams, check_integer, check_number

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PackedMask: TypeAlias = "npt.NDArray[np.uint32]"
"""One bit a token of the vocabulary, least significant first: 1 where it may be drawn."""


class RowControl(Protocol):
    """Decides on the host, token by token, what a row may write next."""

    def mask(self) -> PackedMask | None:
        """The tokens allowed next; None allows all."""
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that have to come next, whatever is drawn; none leaves the next one to the sampler."""
        ...

    def observe(self, token_id: int) -> FinishReason | None:
        """Take note of the token that came; returns why the row ends with it, or None to go on."""
        ...

    @property
    def has_mask(self) -> bool:
        """Whether `mask` may ever be other than None: then drawing has to wait for the token before."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """What the model itself thought of a token: before bias, mask, penalties and temperature.

    Args:
        token_id: the token that came.
        logprob: its natural log-probability.
        top: the likeliest tokens with theirs, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    Args:
        prompt: token ids, at least one.
        sampling: how tokens are drawn.
        max_tokens: most tokens to generate.
        stop_ids: tokens that end the answer.
        control: grammar, thinking budget and the like; None lets the model write what it wants.
        transcript: earlier tokens to continue from where they are equal; it holds all tokens afterwards.
        border_ids: tokens in front of which the transcript is marked: where messages begin.
        call_ids: tokens of the answer from which on the transcript is marked at every one: where calls begin, which a
            template may write in another form.
        top_logprobs: how many of the likeliest tokens to report beside every token's own log-probability; 0 reports
            only its own, None nothing.
        time_limit_s: seconds after which the row ends, waiting included; None sets no limit.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    control: RowControl | None = None
    transcript: Transcript | None = None
    border_ids: frozenset[int] = frozenset()
    call_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.top_logprobs is not None:
            check_integer("top_logprobs", self.top_logprobs, minimum=0)
        if self.time_limit_s is not None:
            check_number("time_limit_s", self.time_limit_s, minimum=0)


class Row:
    """One request on its way through the engine. One thread runs it; others may look, and `cancel`.

    Args:
        request: what is asked.
        vocab_size: V.
        on_progress: called in the engine's thread after every step that changed the row.

    Attributes:
        request: what was asked.
        sampling: how tokens are drawn, with the seed in use.
        generated: the tokens so far, a stop token included.
        logprobs: of each of them, where the request asks for it.
        finish_reason: why it ended; None while it goes on.
        error: what went wrong, where that is why it ended.
        cached_tokens: prompt tokens that did not have to be computed.
        has_called: whether one of `Request.call_ids` came.
        has_news: whether it changed since `on_progress` was called.
        is_led: whether it is computed by several ranks: wishes to end it count from the next step on, by `take_wish`.
        started_s, first_s, last_s: `time.perf_counter` at its making, at the first token, and at the latest change.

    Raises:
        OptionError: logit_bias names a token outside the vocabulary, or top_logprobs more tokens than it has.
    """

    def __init__(self, request: Request, vocab_size: int, on_progress: Callable[[], None] | None = None) -> None:
        check_bias(request.sampling, vocab_size)
        if (request.top_logprobs or 0) > vocab_size:
            raise OptionError(f"top_logprobs is {request.top_logprobs}, expected at most the vocabulary's {vocab_size}")
        seed = request.sampling.seed
        self.request = request
        self.sampling = replace(request.sampling, seed=fresh_seed() if seed is None else seed)
        self.on_progress = on_progress
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cached_tokens = 0
        self.has_called = False
        self.has_news = False
        self.is_led = False
        self._is_cancel_wanted = False
        self._is_cancelled = False
        self.started_s = time.perf_counter()
        self.first_s: float | None = None
        self.last_s = self.started_s

    def cancel(self) -> None:
        """End the row after the step that is being computed; may be called from any thread."""
        self._is_cancel_wanted = True

    @property
    def is_cancelled(self) -> bool:
        """Whether it is to end without further tokens."""
        return self._is_cancelled if self.is_led else self._is_cancel_wanted

    def take_wish(self) -> bool:
        """Between steps of a row that is led: bring in what was wished, or has become due, since the last one.

        Returns:
            Whether it is cancelled from now on.
        """
        if self._is_late:
            self.end("time_limit")
        is_new = self._is_cancel_wanted and not self._is_cancelled
        self._is_cancelled = self._is_cancelled or is_new
        return is_new

    @property
    def _is_late(self) -> bool:
        limit_s = self.request.time_limit_s
        return limit_s is not None and time.perf_counter() - self.started_s >= limit_s

    @property
    def seed(self) -> int:
        """The seed in use, given or drawn."""
        assert self.sampling.seed is not None
        return self.sampling.seed

    def take(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Note a generated token and whether the row ends with it.

        An exception of the control ends the row, and no other.
        """
        try:
            self._take(token_id, logprob)
        except Exception as error:  # noqa: BLE001  # Whatever it is, the other rows have nothing to do with it.
            self.end("error", error)

    def _take(self, token_id: int, logprob: TokenLogprob | None) -> None:
        self.note_token(token_id, logprob)
        control = self.request.control
        wish = control.observe(token_id) if control is not None else None
        if token_id in self.request.stop_ids:
            self.end("stop")
        elif wish is not None:
            self.end(wish)
        elif len(self.generated) >= self.request.max_tokens:
            self.end("length")
        else:
            self.check()

    def note_token(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Note a generated token; what it means for the row is not looked at."""
        if logprob is not None:
            self.logprobs.append(logprob)
        self.generated.append(token_id)
        self.has_called = self.has_called or token_id in self.request.call_ids
        self.has_news = True
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Note why the row ends; the first reason counts."""
        if self.finish_reason is None:
            self.error = error
            self.last_s = time.perf_counter()
            self.has_news = True
            self.finish_reason = reason  # Last: who sees it in another thread sees all the rest.

    def check(self) -> None:
        """End the row if it was cancelled or its time is over."""
        if self.is_cancelled:
            self.end("cancelled")
        elif self._is_late and not self.is_led:
            self.end("time_limit")

    @property
    def is_masked(self) -> bool:
        """Whether its next token cannot be drawn before the last one was looked at."""
        return self.request.control is not None and self.request.control.has_mask

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt, *self.generated]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def is_at_last_token(self) -> bool:
        """Whether the token drawn already is the last one wanted."""
        return self.is_cancelled or len(self.generated) + 1 >= self.request.max_tokens
