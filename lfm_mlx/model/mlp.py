"""The dense feed-forward layer (SwiGLU, Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.kernels import add_norm, in_blocks, silu_multiply
from lfm_mlx.model.linear import AnyLinear, equal_parts
from lfm_mlx.model.norm import Norm

BLOCK_TOKENS = 256
"""Tokens whose hidden values, the widest of the layer, exist at the same time."""


class MLP(Module):
    """``down(silu(gate x) * up x)``, with gate and up in one matrix ``(2 F, D)``."""

    def __init__(self, gate_up_proj: AnyLinear, down_proj: AnyLinear) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def __call__(self, x: mx.array, residual: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
        """Map `x` ``(..., D)`` and add it to `residual` of the same shape: the sum, and `norm` of the sum."""
        if x.size <= BLOCK_TOKENS * x.shape[-1]:
            update = self._update(x)
        else:
            update = in_blocks(self._update, BLOCK_TOKENS, x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return add_norm(residual, update, norm.weight, norm.eps)

    def _update(self, x: mx.array) -> mx.array:
        return self.down_proj(silu_multiply(*equal_parts(self.gate_up_proj(x), 2)))

    def step(self, x: mx.array, residual: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
        """As a call."""
        return self(x, residual, norm)
