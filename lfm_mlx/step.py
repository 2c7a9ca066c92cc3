"""The only callers of a `Model` while serving: `prefill` takes prompts in, `decode` makes one token a row.

A decode step is cut at its attention layers into segments: everything between two attentions (the end of one block,
the convolution blocks, the start of the next) is one pure function of arrays and is compiled as such. Writing keys and
values and attending stay outside, so no trace depends on the length of the context.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from lfm_mlx.cache import State
from lfm_mlx.errors import OptionError
from lfm_mlx.kernels import is_compiling
from lfm_mlx.memory import MIN_CHUNK_TOKENS, prefill_chunk_tokens
from lfm_mlx.model import Attention, Model, Passage, ShortConv
from lfm_mlx.sampling import Sampler
from lfm_mlx.sampling.sampler import State as SamplerState
from lfm_mlx.sampling.sampler import advance, choose

Rows = list[tuple[mx.array, ...]]
"""Remembered rows of the convolutions of one segment, layer by layer."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step that samples returns: ids ``(B,)``, the state they were drawn with, and the logits ``(B, V)``."""

    ids: mx.array
    sampler_state: SamplerState
    logits: mx.array


class Stepper:
    """Runs one model forward: prompts in chunks, then one token a row and step.

    Args:
        model: the model; its weights must not be exchanged afterwards.
        is_compiled: whether decode steps are compiled; None asks `is_compiling`.

    Attributes:
        lock: to be held while steps are built and evaluated, where several threads share the model.
    """

    def __init__(self, model: Model, *, is_compiled: bool | None = None) -> None:
        self.model = model
        self.is_compiled = is_compiling() if is_compiled is None else is_compiled
        self._attention_layers = model.config.attention_layers
        cuts = [None, *self._attention_layers, None]
        self._segments = [self._compiled(_segment(model, *cut)) for cut in itertools.pairwise(cuts)]
        self._conv_layers = _layers_between(self._attention_layers, model.config.num_layers)
        self._scales = [model.layers[layer].operator.scale for layer in self._attention_layers]
        self._sampling_ends: dict[Any, Callable[..., Any]] = {}
        self.lock = threading.RLock()

    def prefill(
        self, state: State, tokens: mx.array, lengths: Sequence[int] | None = None, *, chunk_size: int | None = None
    ) -> mx.array:
        """Take prompts into `state`.

        Args:
            state: what the rows have seen before.
            tokens: int ``(B, L)``, shorter rows padded on the right.
            lengths: real tokens of each row, at least 1; None: all are.
            chunk_size: tokens a row computed at once; None fits them to a memory budget (`prefill_chunk_tokens`).

        Returns:
            Logits ``(B, V)`` of the last real token of each row, unevaluated; the state is evaluated.
        """
        *_, logits = self.prefill_chunks(state, tokens, lengths, chunk_size=chunk_size)
        assert logits is not None
        return logits

    def prefill_chunks(
        self, state: State, tokens: mx.array, lengths: Sequence[int] | None = None, *, chunk_size: int | None = None
    ) -> Iterator[mx.array | None]:
        """`prefill` chunk by chunk: None after every chunk but the last, which yields the logits.

        Raises:
            OptionError: `lengths` does not fit `tokens`; nothing was computed.
            ContextLengthError: a row would outgrow the context.
        """
        B, L = tokens.shape
        taken = list(lengths) if lengths is not None else [L] * B
        if len(taken) != B or not all(1 <= count <= L for count in taken):
            raise OptionError(f"lengths is {taken}, expected {B} whole numbers (one a row) from 1 to {L}")
        if chunk_size is None:
            chunk_size = max(prefill_chunk_tokens(self.model.config, self.model.dtype) // B, MIN_CHUNK_TOKENS)
        state.reserve(max(n + count for n, count in zip(state.lengths, taken, strict=True)) + 1)
        last: list[mx.array | None] = [None] * B
        for start in range(0, L, chunk_size):
            chunk = tokens[:, start : start + chunk_size]
            counts = [min(max(n - start, 0), chunk.shape[1]) for n in taken]
            hidden = self.extend(state, chunk, counts)
            for row, count in enumerate(counts):
                last[row] = hidden[row] if count and start + count == taken[row] else last[row]
            if start + chunk_size < L:
                yield None
        yield self.model.head(mx.stack([row for row in last if row is not None]))

    def extend(self, state: State, tokens: mx.array, counts: Sequence[int] | None = None) -> mx.array:
        """Take one chunk into `state`, evaluated.

        Args:
            state: what the rows have seen before.
            tokens: int ``(B, L)``.
            counts: real tokens of each row; None: all are.

        Returns:
            Normalised hidden states ``(B, D)`` of each row's last real token, evaluated: `Model.head` gives its logits.
        """
        passage = self.passage(state, tokens, counts)
        passage.run(len(self.model.layers))
        rows = passage.normed[:, 0]
        mx.eval(state.arrays, rows)
        return rows

    def passage(self, state: State, tokens: mx.array, counts: Sequence[int] | None = None) -> Passage:
        """`extend` for those who run the layers themselves; it ends in ``(B, 1, D)``, and nothing is evaluated."""
        return Passage(self.model, tokens, state, counts, is_last_wanted=True)

    def decode(self, state: State, tokens: mx.array) -> mx.array:
        """One more token a row: logits ``(B, V)`` after `tokens`, int ``(B,)``; the state moves on.

        Raises:
            ContextLengthError: a row would outgrow the context.
        """
        x, attended, offsets = self._run_to_last(state, tokens)
        logits: mx.array
        logits, rows = self._segments[-1](x, attended, offsets, self._last_rows(state))
        self._remember_last(state, rows)
        return logits

    def decode_and_sample(
        self, state: State, tokens: mx.array, sampler: Sampler, sampler_state: SamplerState
    ) -> Sampled:
        """Record `tokens` with the sampler, `decode` them, and draw: the sampler runs inside the last segment.

        A token is recorded when it is consumed, not when it is drawn: a caller may replace what was drawn.

        Args:
            state: what the rows have seen.
            tokens: int ``(B,)``, drawn by the sampler or put in its place.
            sampler: of the B rows.
            sampler_state: the state that `tokens` were drawn with.
        """
        x, attended, offsets = self._run_to_last(state, tokens)
        end = self._sampling_end(sampler)
        logits, rows, ids, sampler_state = end(
            x, attended, offsets, self._last_rows(state), tokens, sampler_state, sampler.parameters
        )
        self._remember_last(state, rows)
        return Sampled(ids=ids, sampler_state=sampler_state, logits=logits)

    def _run_to_last(self, state: State, tokens: mx.array) -> tuple[mx.array, mx.array | None, mx.array]:
        """All segments but the last, with the attentions between them; the state's lengths move on."""
        span = state.begin(1)
        offsets, layers = span.offsets, state.layers
        x: mx.array = tokens
        attended: mx.array | None = None
        stretches = zip(self._segments, self._attention_layers, self._conv_layers, self._scales, strict=False)
        for segment, layer, conv_layers, scale in stretches:
            seen = [layers[i].rows for i in conv_layers]  # type: ignore[union-attr]
            x, queries, keys, values, rows = segment(x, attended, offsets, seen)
            for i, latest in zip(conv_layers, rows, strict=True):
                layers[i].rows = latest  # type: ignore[union-attr]
            attended = layers[layer].attend(queries, keys, values, span, scale)  # type: ignore[union-attr]
        state.advance(span)
        return x, attended, offsets

    def _last_rows(self, state: State) -> Rows:
        return [state.layers[layer].rows for layer in self._conv_layers[-1]]  # type: ignore[union-attr]

    def _remember_last(self, state: State, rows: Rows) -> None:
        for layer, latest in zip(self._conv_layers[-1], rows, strict=True):
            state.layers[layer].rows = latest  # type: ignore[union-attr]

    def _sampling_end(self, sampler: Sampler) -> Callable[..., Any]:
        """The last segment with sampling behind it; one for each set of features that samplers use."""
        features = sampler.features
        if features not in self._sampling_ends:
            last = _segment(self.model, self._attention_layers[-1] if self._attention_layers else None, None)

            def end(
                x: mx.array,
                attended: mx.array | None,
                offsets: mx.array,
                rows: Rows,
                tokens: mx.array,
                sampler_state: SamplerState,
                parameters: dict[str, mx.array],
            ) -> Any:
                sampler_state = advance(features, sampler_state, parameters, tokens)
                logits, rows = last(x, attended, offsets, rows)
                return logits, rows, choose(features, logits, sampler_state, parameters), sampler_state

            self._sampling_ends[features] = self._compiled(end)
        return self._sampling_ends[features]

    def _compiled(self, function: Function) -> Function:
        return mx.compile(function) if self.is_compiled else function  # type: ignore[return-value]


def _layers_between(attention_layers: Sequence[int], num_layers: int) -> list[range]:
    """The layers of each segment that lie between two attention layers: all of them are convolutions."""
    cuts = [-1, *attention_layers, num_layers]
    return [range(first + 1, last) for first, last in itertools.pairwise(cuts)]


def stepper_of(model: Model) -> Stepper:
    """The model's stepper; kept on the model, so that all callers share what was compiled."""
    if "_stepper" not in vars(model):
        object.__setattr__(model, "_stepper", Stepper(model))
    stepper = vars(model)["_stepper"]
    assert isinstance(stepper, Stepper)
    return stepper


def _segment(model: Model, first: int | None, last: int | None) -> Callable[..., Any]:
    """The computation between the attention of layer `first` and that of layer `last`, for one token a row.

    With `first` None it starts from token ids; with `last` None it ends in logits.
    """
    start = 0 if first is None else first + 1
    stop = model.config.num_layers if last is None else last

    def run(x: mx.array, attended: mx.array | None, offsets: mx.array, rows: Rows) -> Any:
        if first is None:
            x = model.embed_tokens(x[:, None, None]).astype(model.dtype)
            normed = model.layers[0].operator_norm(x)
        else:
            block = model.layers[first]
            assert attended is not None
            x, normed = block.feed_step(x, block.operator.merge_one(attended), model.norm_behind(first))
        latest: Rows = []
        for layer, seen in zip(range(start, stop), rows, strict=True):
            block = model.layers[layer]
            assert isinstance(block.operator, ShortConv)
            mixed, remembered = block.operator.step(normed, seen)
            latest.append(remembered)
            x, normed = block.feed_step(x, mixed, model.norm_behind(layer))
        if last is None:
            return model.head(normed)[:, 0, 0], latest
        block = model.layers[last]
        assert isinstance(block.operator, Attention)
        return x, *block.operator.project(normed, offsets), latest

    return run
