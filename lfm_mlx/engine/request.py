"""What is asked of the engine for one row, and what has become of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from lfm_mlx.cache import Transcript
from lfm_mlx.sampling import check_bias, fresh_seed
from lfm_mlx.types import FinishReason, SamplingParams

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
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    control: RowControl | None = None
    transcript: Transcript | None = None
    border_ids: frozenset[int] = frozenset()
    call_ids: frozenset[int] = frozenset()


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
        finish_reason: why it ended; None while it goes on.
        error: what went wrong, where that is why it ended.
        cached_tokens: prompt tokens that did not have to be computed.
        has_called: whether one of `Request.call_ids` came.
        has_news: whether it changed since `on_progress` was called.
        started_s, first_s, last_s: `time.perf_counter` at its making, at the first token, and at the latest change.

    Raises:
        OptionError: logit_bias names a token outside the vocabulary.
    """

    def __init__(self, request: Request, vocab_size: int, on_progress: Callable[[], None] | None = None) -> None:
        check_bias(request.sampling, vocab_size)
        seed = request.sampling.seed
        self.request = request
        self.sampling = replace(request.sampling, seed=fresh_seed() if seed is None else seed)
        self.on_progress = on_progress
        self.generated: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cached_tokens = 0
        self.has_called = False
        self.has_news = False
        self.is_cancelled = False
        self.started_s = time.perf_counter()
        self.first_s: float | None = None
        self.last_s = self.started_s

    def cancel(self) -> None:
        """End the row after the step that is being computed; may be called from any thread."""
        self.is_cancelled = True

    @property
    def seed(self) -> int:
        """The seed in use, given or drawn."""
        assert self.sampling.seed is not None
        return self.sampling.seed

    def take(self, token_id: int) -> None:
        """Note a generated token and whether the row ends with it."""
        self.generated.append(token_id)
        self.has_called = self.has_called or token_id in self.request.call_ids
        self.has_news = True
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        control = self.request.control
        wish = control.observe(token_id) if control is not None else None
        if token_id in self.request.stop_ids:
            self.end("stop")
        elif wish is not None:
            self.end(wish)
        elif len(self.generated) >= self.request.max_tokens:
            self.end("length")
        elif self.is_cancelled:
            self.end("cancelled")

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Note why the row ends; the first reason counts."""
        if self.finish_reason is None:
            self.error = error
            self.last_s = time.perf_counter()
            self.has_news = True
            self.finish_reason = reason  # Last: who sees it in another thread sees all the rest.

    @property
    def is_at_last_token(self) -> bool:
        """Whether the token drawn next is the last one allowed."""
        return len(self.generated) + 1 >= self.request.max_tokens
