"""Residual addition and the norm behind it, in one launch instead of two."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.kernels.choice import MAX_TOKENS, Case, FusedKernel, are_alike, random_values
from lfm_mlx.kernels.metal_kernel import GROUP_SUM, MAX_THREADS, MetalKernel, constant, threads_for

VALUES = 4
"""Neighbouring values that a thread of the kernel takes."""

SOURCE = """
  threadgroup float partial[32];
  const int width = weight_shape[0];
  const int first = 4 * thread_position_in_threadgroup.x;
  const int start = threadgroup_position_in_grid.y * width + first;
  T values[4];
  float squares = 0.0f;
  if (first < width) {
    for (int i = 0; i < 4; i++) {
      values[i] = T(float(residual[start + i]) + float(update[start + i]));
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
    "add_norm",
    inputs=["residual", "update", "weight", "eps"],
    outputs=["sum", "normed"],
    source=SOURCE,
    header=GROUP_SUM,
)


def add_norm(residual: mx.array, update: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """``s = residual + update`` and ``s / sqrt(mean(s²) + eps) * weight``.

    `s` is rounded to its dtype before it is normalised, statistics are float32, and the normalised value is rounded
    before it is multiplied with the weight: the steps of transformers and of `mx.fast.rms_norm`.

    Args:
        residual: ``(..., D)``.
        update: of the same shape and dtype.
        weight: ``(D,)``.
        eps: added to the mean square.

    Returns:
        Both, of the shape and dtype of `residual`.
    """
    summed, normed = ADD_NORM(residual, update, weight, eps)
    return summed, normed


def _reference(residual: mx.array, update: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    summed = residual + update
    return summed, mx.fast.rms_norm(summed, weight, eps)


def _launch(residual: mx.array, update: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    D = weight.shape[0]
    threads = threads_for(D, VALUES)
    summed, normed = KERNEL.launch(
        [residual, update, weight, constant(eps)],
        template=[("T", residual.dtype)],
        grid=(threads, residual.size // D, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * 2,
        output_dtypes=[residual.dtype] * 2,
    )
    return summed, normed


def can_norm_rows(rows: mx.array, weight: mx.array) -> bool:
    """Whether a kernel with one threadgroup a row can take rows ``(..., D)``, so many and so wide, and this weight."""
    D = weight.shape[0]
    is_in_range = D % VALUES == 0 and D <= VALUES * MAX_THREADS and rows.size <= D * MAX_TOKENS
    return is_in_range and are_alike(rows, weight)


def _case(residual: mx.array, update: mx.array, weight: mx.array, eps: float) -> Case | None:
    is_in_range = can_norm_rows(residual, weight) and are_alike(residual, update)
    return Case.of(residual.dtype, D=weight.shape[0]) if is_in_range else None


def _example(case: Case, num_rows: int, num_tokens: int) -> tuple[mx.array, mx.array, mx.array, float]:
    shape = (num_rows, num_tokens, case["D"])
    residual, update = (random_values(shape, case.dtype, seed) for seed in (1, 2))
    return residual, update, random_values((case["D"],), case.dtype, 3), 1e-5


ADD_NORM = FusedKernel(
    name="add_norm", source=GROUP_SUM + SOURCE, launch=_launch, reference=_reference, case_of=_case, example=_example
)
