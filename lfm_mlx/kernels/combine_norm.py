"""The experts' outputs weighed and added to the residual, and the next norm, in one launch instead of two."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lfm_mlx.kernels import compiling
from lfm_mlx.kernels.add_norm import VALUES, can_norm_rows
from lfm_mlx.kernels.choice import Case, FusedKernel, are_alike, random_values
from lfm_mlx.kernels.elementwise import WEIGHT_SUM_EPS, combine_experts, weigh_experts
from lfm_mlx.kernels.expert_router import Routing
from lfm_mlx.kernels.metal_kernel import GROUP_SUM, SIMD_LANES, MetalKernel, constant, threads_for
from lfm_mlx.kernels.row_blocks import in_blocks

BLOCK_TOKENS = 256
"""Tokens whose outputs are widened to float32 at once where nothing is compiled."""

SOURCE = """
  threadgroup float partial[32];
  const int width = weight_shape[0];
  const int row = threadgroup_position_in_grid.y;
  const int first = 4 * thread_position_in_threadgroup.x;
  const int start = row * width + first;
  float factors[A];
  float factor_sum = 0.0f;
  for (int a = 0; a < A; a++) {
    const float score = float(scores[row * A + a]);
    factors[a] = WEIGHED ? score : 1.0f / (1.0f + metal::precise::exp(-score));
    factor_sum += factors[a];
  }
  const float divisor = !WEIGHED && NORMALIZED ? factor_sum + sum_eps : 1.0f;
  const float multiplier = WEIGHED ? 1.0f : float(scaling_factor);
  T values[4];
  float squares = 0.0f;
  if (first < width) {
    for (int i = 0; i < 4; i++) {
      float update = 0.0f;
      for (int a = 0; a < A; a++) {
        update += factors[a] * float(outputs[(row * A + a) * width + first + i]);
      }
      values[i] = T(float(residual[start + i]) + update / divisor * multiplier);
      squares += float(values[i]) * float(values[i]);
    }
  }
  const float total = group_sum(
      squares, partial, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup);
  const float scale = metal::precise::rsqrt(total / width + eps);
  if (first < width) {
    for (int i = 0; i < 4; i++) {
      sum[start + i] = values[i];
      normed[start + i] = T(float(values[i]) * scale) * weight[first + i];
    }
  }
"""
"""One threadgroup a row."""

KERNEL = MetalKernel(
    "combine_norm",
    inputs=["residual", "outputs", "scores", "weight", "eps", "sum_eps", "scaling_factor"],
    outputs=["sum", "normed"],
    source=SOURCE,
    header=GROUP_SUM,
)

Pair = tuple[mx.array, mx.array]


def combine_norm(
    residual: mx.array,
    outputs: mx.array,
    routing: Routing,
    scaling_factor: float,
    normalize_weights: bool,
    weight: mx.array,
    eps: float,
) -> Pair:
    """``s = residual + sum of weight_a * output_a`` and ``s / sqrt(mean(s²) + eps) * weight``.

    The sum over experts is float32 and rounded once, with the residual in it; what follows is as in
    `lfm_mlx.kernels.add_norm`.

    Args:
        residual: ``(..., D)``, T tokens in all.
        outputs: of the tokens' experts, ``(T, A, 1, D)`` or ``(T, A D)``.
        routing: which experts, and their weights or logits.
        scaling_factor: factor on weights that come from logits.
        normalize_weights: whether weights that come from logits are divided by their sum.
        weight: of the norm, ``(D,)``.
        eps: added to the mean square.

    Returns:
        Both, of the shape and dtype of `residual`.
    """
    summed, normed = COMBINE_NORM(residual, outputs, routing, scaling_factor, normalize_weights, weight, eps)
    return summed, normed


def _reference(
    residual: mx.array,
    outputs: mx.array,
    routing: Routing,
    scaling_factor: float,
    normalize_weights: bool,
    weight: mx.array,
    eps: float,
) -> Pair:
    summed = combine(residual, outputs, routing, scaling_factor, normalize_weights)
    return summed, mx.fast.rms_norm(summed, weight, eps)


def combine(
    residual: mx.array | None,
    outputs: mx.array,
    routing: Routing,
    scaling_factor: float,
    normalize_weights: bool,
) -> mx.array:
    """The sum in `combine_norm`, by stock operations and without the norm; arguments as there.

    Returns:
        The shape and dtype of `residual`; without one, ``(T, 1, 1, D)`` or ``(T, D)`` as `outputs` are, in their dtype.
    """
    A = routing.scores.shape[-1]
    D = outputs.shape[-1] if outputs.ndim == 4 else outputs.shape[-1] // A
    if not compiling.is_compiling():
        # What compiles to one kernel is some thirty operations otherwise.
        summed = _product(residual, outputs.reshape(-1, A, D), routing, scaling_factor, normalize_weights)
        if residual is not None:
            return summed.reshape(residual.shape)
        return summed[:, None, None] if outputs.ndim == 4 else summed
    parts = _parts(outputs, A, D)
    scores = [routing.scores[..., i : i + 1] for i in range(A)]
    added = residual.reshape(parts[0].shape) if residual is not None else None
    if routing.is_weighed:
        summed = weigh_experts(added, parts, scores)
    else:
        summed = combine_experts(added, parts, scores, scaling_factor, normalize_weights)
    return summed if residual is None else summed.reshape(residual.shape)


def _product(
    residual: mx.array | None, outputs: mx.array, routing: Routing, scaling_factor: float, normalize_weights: bool
) -> mx.array:
    """The sum ``(T, D)`` of outputs ``(T, A, D)`` as a matrix product a token, in few operations."""
    D = outputs.shape[-1]

    def compute(outputs: mx.array, scores: mx.array, residual: mx.array | None = None) -> mx.array:
        weights = scores[:, None].astype(mx.float32)
        if not routing.is_weighed:
            weights = mx.sigmoid(weights)
            if normalize_weights:
                weights = weights / (weights.sum(axis=-1, keepdims=True) + WEIGHT_SUM_EPS)
            if scaling_factor != 1.0:
                weights = weights * scaling_factor
        total = (weights @ outputs.astype(mx.float32))[:, 0]
        if residual is None:
            return total.astype(outputs.dtype)
        return (residual.astype(mx.float32) + total).astype(residual.dtype)

    scores = routing.scores.reshape(outputs.shape[0], -1)
    added = [] if residual is None else [residual.reshape(-1, D)]
    return in_blocks(compute, BLOCK_TOKENS, outputs, scores, *added)


def _parts(outputs: mx.array, num_active: int, width: int) -> Sequence[mx.array]:
    if outputs.ndim == 2:
        return [outputs[:, i * width : (i + 1) * width] for i in range(num_active)]
    return [outputs[:, i : i + 1] for i in range(num_active)]  # (T, 1, 1, D)


def _launch(
    residual: mx.array,
    outputs: mx.array,
    routing: Routing,
    scaling_factor: float,
    normalize_weights: bool,
    weight: mx.array,
    eps: float,
) -> Pair:
    A, D = routing.scores.shape[-1], residual.shape[-1]
    threads = threads_for(D, VALUES)
    summed, normed = KERNEL.launch(
        [
            residual,
            outputs,
            routing.scores,
            weight,
            constant(eps),
            constant(WEIGHT_SUM_EPS),
            constant(scaling_factor),
        ],
        template=[
            ("T", residual.dtype),
            ("A", A),
            ("WEIGHED", routing.is_weighed),
            ("NORMALIZED", normalize_weights),
        ],
        grid=(threads, residual.size // D, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * 2,
        output_dtypes=[residual.dtype] * 2,
    )
    return summed, normed


def _case(
    residual: mx.array,
    outputs: mx.array,
    routing: Routing,
    scaling_factor: float,
    normalize_weights: bool,
    weight: mx.array,
    eps: float,
) -> Case | None:
    A = routing.scores.shape[-1]
    has_scores = routing.scores.dtype == mx.float32 if routing.is_weighed else are_alike(residual, routing.scores)
    if not can_norm_rows(residual, weight) or not are_alike(residual, outputs) or A > SIMD_LANES or not has_scores:
        return None
    normalized = normalize_weights and not routing.is_weighed
    return Case.of(residual.dtype, D=weight.shape[0], A=A, weighed=routing.is_weighed, normalized=normalized)


def _example(
    case: Case, num_rows: int, num_tokens: int
) -> tuple[mx.array, mx.array, Routing, float, bool, mx.array, float]:
    T, D, A = num_rows * num_tokens, case["D"], case["A"]
    is_weighed = bool(case["weighed"])
    residual = random_values((T, 1, 1, D), case.dtype, 1)
    outputs = random_values((T, A, 1, D), case.dtype, 2)
    scores = random_values((T, 1, 1, A), mx.float32 if is_weighed else case.dtype, 3)
    routing = Routing(mx.zeros(scores.shape, dtype=mx.uint32), scores, is_weighed)
    return residual, outputs, routing, 1.5, bool(case["normalized"]), random_values((D,), case.dtype, 4), 1e-5


COMBINE_NORM = FusedKernel(
    name="combine_norm",
    source=GROUP_SUM + SOURCE,
    launch=_launch,
    reference=_reference,
    case_of=_case,
    example=_example,
)
