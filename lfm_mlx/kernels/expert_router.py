"""The choice of experts and their weights from the router's logits, in one launch instead of three."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from lfm_mlx.kernels.choice import MAX_TOKENS, Case, FusedKernel, are_alike, random_values
from lfm_mlx.kernels.elementwise import WEIGHT_SUM_EPS, rank_experts
from lfm_mlx.kernels.metal_kernel import SIMD_LANES, MetalKernel, constant

MAX_EXPERTS = 256

SOURCE = """
  constexpr int CANDIDATES = (E + 31) / 32;
  const uint lane = thread_index_in_simdgroup;
  const uint row = thread_position_in_grid.y;
  const uint start = row * E;
  float ranks[CANDIDATES];
  for (uint n = 0; n < CANDIDATES; n++) {
    const uint e = lane + 32 * n;
    if (e < E) {
      const float score = float(T(1.0f / (1.0f + metal::precise::exp(-float(logits[start + e])))));
      const float rank = score + bias[e];
      ranks[n] = metal::isnan(rank) ? -INFINITY : rank;
    }
  }
  uint taken = 0;  // a bit for each of the lane's candidates
  uint expert = 0;
  for (uint a = 0; a < A; a++) {
    float best = -INFINITY;
    uint at = E;
    for (uint n = 0; n < CANDIDATES; n++) {
      const uint e = lane + 32 * n;
      if (e < E && !(taken >> n & 1) && (at == E || ranks[n] > best)) {
        best = ranks[n];
        at = e;
      }
    }
    const float highest = metal::simd_max(best);
    const uint winner = metal::simd_min(at < E && best == highest ? at : uint(E));
    if (winner % 32 == lane) {
      taken |= 1u << (winner / 32);
    }
    if (lane == a) {
      expert = winner;
    }
  }
  const float weight = lane < A ? 1.0f / (1.0f + metal::precise::exp(-float(logits[start + expert]))) : 0.0f;
  const float total = metal::simd_sum(weight);
  if (lane < A) {
    experts[row * A + lane] = expert;
    weights[row * A + lane] = (NORMALIZED ? weight / (total + sum_eps) : weight) * scaling_factor;
  }
"""
"""One SIMD group a token: in A rounds the best expert that is left is found; of equal ones, the first.

A rank that is no number counts as the lowest: whatever comes in, A different experts that exist come out.
"""

KERNEL = MetalKernel(
    "expert_router",
    inputs=["logits", "bias", "sum_eps", "scaling_factor"],
    outputs=["experts", "weights"],
    source=SOURCE,
)


class Routing(NamedTuple):
    """Which experts work on each token, and with which weights.

    Args:
        experts: uint32 ``(..., A)``, in no particular order.
        scores: ``(..., A)``: float32 weights where `is_weighed`, else the router's logits of those experts, which
            `lfm_mlx.kernels.combine_norm` turns into weights on its way.
        is_weighed: which of the two.
    """

    experts: mx.array
    scores: mx.array
    is_weighed: bool


def route(
    logits: mx.array, bias: mx.array | None, num_active: int, scaling_factor: float, normalize_weights: bool
) -> Routing:
    """Choose the A experts of the highest ``sigmoid(logit) + bias``; they weigh ``sigmoid(logit)``.

    The sigmoid that ranks is rounded to the logits' dtype, the one that weighs is float32. With `normalize_weights`
    a token's weights are divided by their sum + 1e-6; then `scaling_factor` multiplies them.

    Args:
        logits: ``(..., E)``.
        bias: float32 ``(E,)``, or None.
        num_active: A.
        scaling_factor: factor on the weights.
        normalize_weights: whether weights are divided by their sum.
    """
    routing: Routing = ROUTER(logits, bias, num_active, scaling_factor, normalize_weights)
    return routing


def weights_of(logits: Sequence[mx.array], scaling_factor: float, normalize_weights: bool) -> list[mx.array]:
    """Float32 weights of a token's experts from their logits, in parts of any one shape."""
    weights = [mx.sigmoid(logit.astype(mx.float32)) for logit in logits]
    if normalize_weights:
        total = sum(weights[1:], weights[0]) + WEIGHT_SUM_EPS
        weights = [weight / total for weight in weights]
    return [weight * scaling_factor for weight in weights]


def _reference(
    logits: mx.array, bias: mx.array | None, num_active: int, scaling_factor: float, normalize_weights: bool
) -> Routing:
    ranked = rank_experts(logits, bias)
    experts = mx.argpartition(ranked, kth=-num_active, axis=-1)[..., -num_active:]
    return Routing(experts, mx.take_along_axis(logits, experts, axis=-1), False)


def _exact(
    logits: mx.array, bias: mx.array | None, num_active: int, scaling_factor: float, normalize_weights: bool
) -> Routing:
    routing = _reference(logits, bias, num_active, scaling_factor, normalize_weights)
    parts = [routing.scores[..., i] for i in range(num_active)]
    weights = mx.stack(weights_of(parts, scaling_factor, normalize_weights), axis=-1)
    return Routing(routing.experts, weights, True)


def _launch(
    logits: mx.array, bias: mx.array | None, num_active: int, scaling_factor: float, normalize_weights: bool
) -> Routing:
    E = logits.shape[-1]
    shape = (*logits.shape[:-1], num_active)
    experts, weights = KERNEL.launch(
        [logits, no_bias(E) if bias is None else bias, constant(WEIGHT_SUM_EPS), constant(scaling_factor)],
        template=[("T", logits.dtype), ("E", E), ("A", num_active), ("NORMALIZED", normalize_weights)],
        grid=(SIMD_LANES, logits.size // E, 1),
        threadgroup=(SIMD_LANES, 1, 1),
        output_shapes=[shape] * 2,
        output_dtypes=[mx.uint32, mx.float32],
    )
    return Routing(experts, weights, True)


@functools.cache
def no_bias(num_experts: int) -> mx.array:
    """Zeros float32 ``(E,)``; kept."""
    made = mx.zeros((num_experts,), dtype=mx.float32)
    mx.eval(made)
    return made


def _case(
    logits: mx.array, bias: mx.array | None, num_active: int, scaling_factor: float, normalize_weights: bool
) -> Case | None:
    E = logits.shape[-1]
    is_in_range = num_active <= min(E, SIMD_LANES) and E <= MAX_EXPERTS and logits.size <= E * MAX_TOKENS
    if not is_in_range or not are_alike(logits) or (bias is not None and bias.dtype != mx.float32):
        return None
    return Case.of(logits.dtype, E=E, A=num_active, normalized=normalize_weights)


def _example(case: Case, num_rows: int, num_tokens: int) -> tuple[mx.array, mx.array, int, float, bool]:
    """Ranks below zero, the nearest 0.03 apart: biases are halves, and five sigmoids differ by no multiple of that.

    So no rounding decides a choice, and neighbours in the order of biases still change places.
    """
    E = case["E"]
    order = mx.argsort(random_values((num_rows, num_tokens, E), mx.float32, 1), axis=-1)
    logits = (order % 5).astype(case.dtype) - 2
    bias = 0.5 * mx.argsort(random_values((E,), mx.float32, 2)) - 0.5 * E - 1.0
    return logits, bias, case["A"], 1.5, bool(case["normalized"])


def _by_expert(routing: Routing) -> list[mx.array]:
    order = mx.argsort(routing.experts, axis=-1)
    return [mx.take_along_axis(array, order, axis=-1) for array in (routing.experts, routing.scores)]


ROUTER = FusedKernel(
    name="expert_router",
    source=SOURCE,
    launch=_launch,
    reference=_reference,
    case_of=_case,
    example=_example,
    exact=_exact,
    comparable=_by_expert,
)
