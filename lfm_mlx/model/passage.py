"""One chunk of tokens on its way through the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from lfm_mlx.cache import ConvState, Span, State
from lfm_mlx.errors import OptionError

if TYPE_CHECKING:
    from lfm_mlx.model.lfm2 import Model


class Passage:
    """Runs a chunk through a model, all layers at once or some at a time; the state counts it when all have run.

    A passage that is given up in between leaves a state that nothing can go on from.

    Args:
        model: the model.
        tokens: int ``(B, L)``.
        state: what the rows have seen before; None: nothing, and nothing is remembered.
        lengths: how many of each row's L tokens are real, the rest being padding on the right; None: all are.
        is_last_wanted: only the last real token of each row is wanted, and the last layer computes no other further
            than it has to for the state.

    Attributes:
        num_run: layers that have run.
        normed: ``(B, L, D)``, input of the next layer behind its norm; at the end normalised hidden states, then
            ``(B, 1, D)`` where only the last token is wanted.

    Raises:
        OptionError: `tokens` is not (B, L), or does not fit `state` or `lengths`.
        ContextLengthError: a row would outgrow the context.
    """

    def __init__(
        self,
        model: Model,
        tokens: mx.array,
        state: State | None,
        lengths: Sequence[int] | None = None,
        *,
        is_last_wanted: bool = False,
    ) -> None:
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise OptionError(f"tokens has shape {tokens.shape}, expected (rows, tokens), both at least 1")
        B, L = tokens.shape
        if state is not None and state.batch_size != B:
            raise OptionError(f"tokens has {B} rows, but the state has {state.batch_size}")
        self._model = model
        self._state = state
        self._span = state.begin(L, lengths) if state is not None else Span.make((0,) * B, L, lengths)
        self._is_last_wanted = is_last_wanted
        self.num_run = 0
        self._x = model.embed_tokens(tokens).astype(model.dtype)
        self.normed = model.layers[0].operator_norm(self._x)

    def run(self, num_layers: int) -> None:
        """Run at most so many further layers; nothing is evaluated."""
        layers = self._model.layers
        for i in range(self.num_run, min(self.num_run + num_layers, len(layers))):
            layer_state = self._state.layers[i] if self._state is not None else None
            x, mixed = self._x, layers[i].mix(self.normed, layer_state, self._span)
            if self._is_last_wanted and i + 1 == len(layers):
                x, mixed = self._last(x), self._last(mixed)
            self._x, self.normed = layers[i].feed(x, mixed, self._model.norm_behind(i))
            self.num_run = i + 1
        if self.is_done and self._state is not None:
            self._state.advance(self._span)

    @property
    def is_done(self) -> bool:
        """Whether all layers have run."""
        return self.num_run == len(self._model.layers)

    @property
    def arrays(self) -> list[mx.array]:
        """What the layers that have run left: evaluating it leaves nothing of them to be computed."""
        held = [self._x, self.normed]
        if self._state is not None and self.num_run:
            layer = self._state.layers[self.num_run - 1]
            held += layer.arrays
            if isinstance(layer, ConvState) and layer.handed_out is not None:
                held.append(layer.handed_out)
        return held

    def _last(self, x: mx.array) -> mx.array:
        """The last real token of each row, ``(B, 1, D)``; the first where a row has none."""
        if not self._span.is_padded:
            return x[:, -1:]
        last = mx.array([max(count - 1, 0) for count in self._span.counts], dtype=mx.int32)
        return mx.take_along_axis(x, last[:, None, None], axis=1)
