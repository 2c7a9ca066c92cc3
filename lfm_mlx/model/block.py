"""One layer: an operator (convolution or attention) and a feed-forward part, each behind a norm and added."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.cache import AttentionCache, ConvState, LayerState, Span
from lfm_mlx.kernels import add_norm
from lfm_mlx.model.attention import Attention
from lfm_mlx.model.mlp import MLP
from lfm_mlx.model.moe import MoE
from lfm_mlx.model.norm import Norm
from lfm_mlx.model.short_conv import ShortConv


class Block(Module):
    """``h = x + operator(norm x)``, then ``h + feed_forward(norm h)``."""

    def __init__(
        self, operator_norm: Norm, operator: ShortConv | Attention, ffn_norm: Norm, feed_forward: MLP | MoE
    ) -> None:
        super().__init__()
        self.operator_norm = operator_norm
        self.operator = operator
        self.ffn_norm = ffn_norm
        self.feed_forward = feed_forward

    def __call__(
        self, x: mx.array, normed: mx.array, state: LayerState | None, span: Span, following: Norm
    ) -> tuple[mx.array, mx.array]:
        """Compute the layer and move its state on.

        Args:
            x: ``(B, L, D)``.
            normed: `operator_norm` of `x`; a layer hands it to the next, so that adding and normalising are one kernel.
            state: what the layer remembers, None for nothing.
            span: where the tokens stand.
            following: the norm behind this layer: the next layer's `operator_norm`, or the last norm.

        Returns:
            The layer's output ``(B, L, D)``, and `following` of it.
        """
        return self.feed(x, self.mix(normed, state, span), following)

    def mix(self, normed: mx.array, state: LayerState | None, span: Span) -> mx.array:
        """The first half of a call: what the operator makes of ``(B, L, D)``; the layer's state moves on."""
        if isinstance(self.operator, Attention):
            assert state is None or isinstance(state, AttentionCache)
            return self.operator(normed, state, span)
        assert state is None or isinstance(state, ConvState)
        return self.operator(normed, state, span)

    def feed(self, x: mx.array, mixed: mx.array, following: Norm) -> tuple[mx.array, mx.array]:
        """The second half of a call: what it returns, from the layer's input and the operator's output."""
        summed, normed = self._add(x, mixed)
        return self.feed_forward(normed, summed, following)

    def feed_step(self, x: mx.array, mixed: mx.array, following: Norm) -> tuple[mx.array, mx.array]:
        """The second half for one token a row, all arrays ``(B, 1, 1, D)``: what a call returns.

        Args:
            x: the layer's input.
            mixed: the operator's output.
            following: the norm behind this layer.
        """
        summed, normed = self._add(x, mixed)
        return self.feed_forward.step(normed, summed, following)

    def _add(self, x: mx.array, mixed: mx.array) -> tuple[mx.array, mx.array]:
        return add_norm(x, mixed, self.ffn_norm.weight, self.ffn_norm.eps)
