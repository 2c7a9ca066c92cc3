"""The mixture-of-experts feed-forward layer (transformers ``Lfm2MoeSparseMoeBlock``)."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.kernels import combine_experts, rank_experts, silu_multiply
from lfm_mlx.model.linear import AnyExpertLinear, AnyLinear

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

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """Map ``(B, L, D)`` and add it to `residual` ``(B, L, D)``."""
        D = x.shape[-1]
        tokens = x.reshape(-1, D)  # (T, D)
        experts, logits = self.route(tokens)
        dispatch = self._sorted if tokens.shape[0] >= SORTED_FROM_TOKENS else self._paired
        outputs = dispatch(tokens, experts)  # (T, A, D)
        combined = combine_experts(
            residual.reshape(-1, D),
            [outputs[:, i] for i in range(self.num_active)],
            [logits[:, i : i + 1] for i in range(self.num_active)],
            self.scaling_factor,
            self.normalize_weights,
        )
        return combined.reshape(residual.shape)

    def route(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Choose experts for tokens ``(T, D)``.

        Returns:
            Expert ids, uint32 ``(T, A)`` in no particular order, and the router's logits for them ``(T, A)``: an
            expert's weight is the sigmoid of its logit, and the bias has no part in it.
        """
        logits = self.gate(tokens)
        ranked = rank_experts(logits, self.expert_bias if "expert_bias" in self else None)
        experts = mx.argpartition(ranked, kth=-self.num_active, axis=-1)[:, -self.num_active :]
        return experts, mx.take_along_axis(logits, experts, axis=-1)

    def _paired(self, tokens: mx.array, experts: mx.array) -> mx.array:
        """Experts' outputs ``(T, A, D)``, one matvec a (token, expert) pair."""
        T, A = experts.shape
        once, paired = self._row_indices(T)
        hidden = self._gated(self.gate_up_proj(tokens[:, None], experts, once))  # (T, A, 1, F)
        outputs = self.down_proj(hidden.reshape(T * A, 1, -1), experts, paired)
        return outputs.squeeze(-2)

    def _sorted(self, tokens: mx.array, experts: mx.array) -> mx.array:
        """Experts' outputs ``(T, A, D)``, tokens of the same expert side by side so that its matrix is read once."""
        T, A = experts.shape
        chosen = experts.flatten()
        order = mx.argsort(chosen)
        chosen = chosen[order]
        hidden = self._gated(self.gate_up_proj(tokens[order // A][:, None], chosen, is_sorted=True))  # (T A, 1, F)
        outputs = self.down_proj(hidden, chosen, is_sorted=True)
        return outputs.squeeze(-2)[mx.argsort(order)].reshape(T, A, -1)

    def _gated(self, gate_up: mx.array) -> mx.array:
        gate, up = mx.split(gate_up, 2, axis=-1)
        return silu_multiply(gate, up)

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
