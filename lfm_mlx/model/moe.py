"""The mixture-of-experts feed-forward layer (transformers ``Lfm2MoeSparseMoeBlock``)."""

from __future__ import annotations

import functools

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.kernels import Routing, combine_norm, in_blocks, route, silu_multiply
from lfm_mlx.model.linear import AnyExpertLinear, AnyLinear, equal_parts
from lfm_mlx.model.norm import Norm

SORTED_FROM_TOKENS = 32
"""From this many tokens a call, tokens are sorted by expert: below, each (token, expert) pair is a matvec anyway."""

BLOCK_PAIRS = 1024
"""Sorted (token, expert) pairs whose hidden values exist at the same time; nearly all experts are in one block only."""


class MoE(Module):
    """A of E experts work on each token; their outputs are added with normalised sigmoid weights.

    Args:
        gate: the router ``(E, D)``.
        expert_bias: float32 ``(E,)`` that helps choose experts and never weighs them, or None.
        gate_up_proj: the experts' gate and up matrices ``(E, 2 F, D)``.
        down_proj: ``(E, D, F)``.
        num_active: A.
        normalize_weights: whether the A weights are divided by their sum.
        scaling_factor: factor on the weights.
    """

    def __init__(
        self,
        *,
        gate: AnyLinear,
        expert_bias: mx.array | None,
        gate_up_proj: AnyExpertLinear,
        down_proj: AnyExpertLinear,
        num_active: int,
        normalize_weights: bool,
        scaling_factor: float,
    ) -> None:
        super().__init__()
        self.gate = gate
        if expert_bias is not None:
            self.expert_bias = expert_bias
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.num_active = num_active
        self.normalize_weights = normalize_weights
        self.scaling_factor = scaling_factor

    def __call__(self, x: mx.array, residual: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
        """Map `x` ``(B, L, D)`` and add it to `residual` ``(B, L, D)``: the sum, and `norm` of the sum."""
        D = x.shape[-1]
        tokens = x.reshape(-1, D)  # (T, D)
        if tokens.shape[0] < SORTED_FROM_TOKENS:
            summed, normed = self.step(tokens[:, None, None], residual.reshape(-1, 1, 1, D), norm)
        else:
            routing = self.route(tokens)
            outputs = self._sorted(tokens, routing.experts)  # (T, A D)
            summed, normed = self._combine(residual.reshape(-1, D), outputs, routing, norm)
        return summed.reshape(residual.shape), normed.reshape(residual.shape)

    def step(self, x: mx.array, residual: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
        """As a call, for a few tokens ``(T, 1, 1, D)``: a shape in which nothing has to be reshaped on the way."""
        routing = self.route(x)  # (T, 1, 1, A)
        T, A = x.shape[0], self.num_active
        chosen = routing.experts.reshape(T, A)
        once, paired = pair_rows(T, A)
        hidden = self._gated(self.gate_up_proj(x, chosen, once))  # (T, A, 1, F)
        outputs = self.down_proj(hidden, chosen, paired)  # (T, A, 1, D)
        return self._combine(residual, outputs, routing, norm)

    def _combine(
        self, residual: mx.array, outputs: mx.array, routing: Routing, norm: Norm
    ) -> tuple[mx.array, mx.array]:
        return combine_norm(
            residual, outputs, routing, self.scaling_factor, self.normalize_weights, norm.weight, norm.eps
        )

    def route(self, tokens: mx.array) -> Routing:
        """Choose experts for tokens ``(..., D)``: the bias helps choose them and never weighs."""
        bias = self.expert_bias if "expert_bias" in self else None
        return route(self.gate(tokens), bias, self.num_active, self.scaling_factor, self.normalize_weights)

    def _sorted(self, tokens: mx.array, experts: mx.array) -> mx.array:
        """Experts' outputs ``(T, A D)``, tokens of the same expert side by side so that its matrix is read once."""
        T, A = experts.shape
        chosen = experts.flatten()
        order = mx.argsort(chosen)
        chosen = chosen[order]

        def compute(order: mx.array, chosen: mx.array) -> mx.array:
            hidden = self._gated(self.gate_up_proj(tokens[order // A][:, None], chosen, is_sorted=True))  # (N, 1, F)
            return self.down_proj(hidden, chosen, is_sorted=True).squeeze(-2)

        return in_blocks(compute, BLOCK_PAIRS, order, chosen, places=order).reshape(T, -1)

    def _gated(self, gate_up: mx.array) -> mx.array:
        return silu_multiply(*equal_parts(gate_up, 2))


@functools.cache
def pair_rows(num_tokens: int, num_active: int) -> tuple[mx.array, mx.array]:
    """Which row of its input each (token, expert) pair reads, uint32 ``(T, A)``: its token's, or the pair's own.

    Kept, because an index array made in the step would be a kernel launch a matmul.
    """
    pairs = mx.arange(num_tokens * num_active, dtype=mx.uint32).reshape(num_tokens, num_active)
    rows = (pairs // num_active, pairs)
    mx.eval(rows)
    return rows
