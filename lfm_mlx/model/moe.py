"""The mixture-of-experts feed-forward layer (transformers ``Lfm2MoeSparseMoeBlock``)."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.model.linear import AnyExpertLinear, AnyLinear
from lfm_mlx.model.mlp import gate_up

SORTED_FROM_TOKENS = 32
"""From this many tokens a call, tokens are sorted by expert: below, each (token, expert) pair is a matvec anyway."""


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
        self._rows: dict[int, tuple[mx.array, mx.array]] = {}

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``(B, L, D)`` to ``(B, L, D)``."""
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        experts, weights = self.route(tokens)
        dispatch = self._sorted if tokens.shape[0] >= SORTED_FROM_TOKENS else self._paired
        outputs = dispatch(tokens, experts)  # (T, A, D)
        return (weights[:, None] @ outputs).reshape(x.shape)

    def route(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Choose experts for tokens ``(T, D)``.

        Returns:
            Expert ids, uint32 ``(T, A)`` in no particular order, and their weights ``(T, A)`` in the tokens' dtype.
        """
        scores = mx.sigmoid(self.gate(tokens))
        ranked = scores.astype(mx.float32) + self.expert_bias if "expert_bias" in self else scores
        experts = mx.argpartition(ranked, kth=-self.num_active, axis=-1)[:, -self.num_active :]
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if self.normalize_weights:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-6)
        return experts, (weights * self.scaling_factor).astype(tokens.dtype)

    def _paired(self, tokens: mx.array, experts: mx.array) -> mx.array:
        """Experts' outputs ``(T, A, D)``, one matvec a (token, expert) pair."""
        T, A = experts.shape
        once, paired = self._row_indices(T)
        hidden = gate_up(self.gate_up_proj(tokens[:, None], experts, once))  # (T, A, 1, F)
        outputs = self.down_proj(hidden.reshape(T * A, 1, -1), experts, paired)
        return outputs.squeeze(-2)

    def _sorted(self, tokens: mx.array, experts: mx.array) -> mx.array:
        """Experts' outputs ``(T, A, D)``, tokens of the same expert side by side so that its matrix is read once."""
        T, A = experts.shape
        chosen = experts.flatten()
        order = mx.argsort(chosen)
        chosen = chosen[order]
        hidden = gate_up(self.gate_up_proj(tokens[order // A][:, None], chosen, is_sorted=True))  # (T A, 1, F)
        outputs = self.down_proj(hidden, chosen, is_sorted=True)
        return outputs.squeeze(-2)[mx.argsort(order)].reshape(T, A, -1)

    def _row_indices(self, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Which row of its input each pair reads, uint32 ``(T, A)``: each token A times, or each pair's own row.

        Kept, because an index array made in the step would be a kernel launch a matmul.
        """
        if num_tokens not in self._rows:
            pairs = mx.arange(num_tokens * self.num_active, dtype=mx.uint32).reshape(num_tokens, self.num_active)
            rows = (pairs // self.num_active, pairs)
            mx.eval(rows)
            self._rows[num_tokens] = rows
        return self._rows[num_tokens]
