"""The elementwise arithmetic between matmuls, each function one kernel launch when compiled.

`gated_conv`, `combine_experts` and `weigh_experts` compute in float32 and round once, at the end, to the dtype of
what comes in; the others compute in that dtype, as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.kernels.compiling import fused

WEIGHT_SUM_EPS = 1e-6
"""Added to the sum of expert weights before dividing by it, as transformers does."""


@fused
def silu_multiply(gate: mx.array, up: mx.array) -> mx.array:
    """``gate * sigmoid(gate) * up``, all of one shape."""
    return gate * mx.sigmoid(gate) * up


@fused
def gated_conv(
    gate: mx.array, windows: Sequence[mx.array], taps: Sequence[mx.array], bias: mx.array | None
) -> mx.array:
    """``gate * (sum of window * tap + bias)``.

    Args:
        gate: ``(B, L, D)``.
        windows: W arrays ``(B, L, D)``, oldest first.
        taps: W arrays ``(D,)``, float32.
        bias: ``(D,)`` or None.
    """
    total = windows[0].astype(mx.float32) * taps[0]
    for window, tap in zip(windows[1:], taps[1:], strict=True):
        total = total + window.astype(mx.float32) * tap
    if bias is not None:
        total = total + bias
    return (gate.astype(mx.float32) * total).astype(gate.dtype)


@fused
def rank_experts(logits: mx.array, bias: mx.array | None) -> mx.array:
    """What experts are chosen by: ``sigmoid(logits) + bias``, float32 ``(T, E)``; the sigmoid in the logits' dtype."""
    scores = mx.sigmoid(logits).astype(mx.float32)
    return scores if bias is None else scores + bias


@fused
def combine_experts(
    residual: mx.array | None,
    outputs: Sequence[mx.array],
    logits: Sequence[mx.array],
    scaling_factor: float,
    normalize_weights: bool,
) -> mx.array:
    """Weigh the experts' outputs, add them, and add the residual.

    Args:
        residual: ``(T, D)``, or None to add none.
        outputs: A arrays ``(T, D)``.
        logits: the router's logits of those experts, A arrays ``(T, 1)``.
        scaling_factor: factor on the weights.
        normalize_weights: whether the weights are divided by their sum.
    """
    weights = [mx.sigmoid(logit.astype(mx.float32)) for logit in logits]
    total = weights[0] * outputs[0].astype(mx.float32)
    weight_sum = weights[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output.astype(mx.float32)
        weight_sum = weight_sum + weight
    if normalize_weights:
        total = total / (weight_sum + WEIGHT_SUM_EPS)
    if scaling_factor != 1.0:
        total = total * scaling_factor
    return _added(residual, total, outputs[0].dtype)


@fused
def weigh_experts(residual: mx.array | None, outputs: Sequence[mx.array], weights: Sequence[mx.array]) -> mx.array:
    """``residual + sum of weight * output``: `combine_experts` with float32 weights ``(T, 1)`` at hand."""
    total = weights[0] * outputs[0].astype(mx.float32)
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output.astype(mx.float32)
    return _added(residual, total, outputs[0].dtype)


def _added(residual: mx.array | None, total: mx.array, dtype: mx.Dtype) -> mx.array:
    """The sum of a residual, if there is one, and a float32 total, rounded to the residual's dtype, or to `dtype`."""
    return total.astype(dtype) if residual is None else (residual.astype(mx.float32) + total).astype(residual.dtype)
