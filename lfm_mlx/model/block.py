"""One layer: an operator (convolution or attention) and a feed-forward part, each behind a norm and added."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.cache import AttentionCache, ConvState, LayerState, Span
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

    def __call__(self, x: mx.array, state: LayerState | None, span: Span) -> mx.array:
        """Map ``(B, L, D)`` to ``(B, L, D)`` and move the layer's state on."""
        normed = self.operator_norm(x)
        if isinstance(self.operator, Attention):
            assert state is None or isinstance(state, AttentionCache)
            mixed = self.operator(normed, state, span)
        else:
            assert state is None or isinstance(state, ConvState)
            mixed = self.operator(normed, state, span)
        return self.feed(x + mixed)

    def feed(self, x: mx.array) -> mx.array:
        """The feed-forward half: ``(B, L, D)`` to ``(B, L, D)``."""
        return self.feed_forward(self.ffn_norm(x), x)

    def feed_step(self, x: mx.array) -> mx.array:
        """`feed` of one token a row: ``(B, 1, 1, D)`` to ``(B, 1, 1, D)``."""
        return self.feed_forward.step(self.ffn_norm(x), x)
