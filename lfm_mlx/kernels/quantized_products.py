"""Products with quantised matrices, ``x @ dequantise(w).T``, for activations of any dtype.

MLX's CPU backend multiplies 16-bit activations with quantised weights about ten times slower than float32 ones. There,
activations, scales and biases are widened for the product and the result is rounded once, a few rows at a time, so that
the wide copies of a long prompt are never all alive.
"""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.config import Quantization
from lfm_mlx.kernels.row_blocks import in_blocks

WIDE_ROWS = 256
"""Rows that are widened at once."""


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, stored: Quantization
) -> mx.array:
    """Map ``(..., in)`` to ``(..., out)``.

    Args:
        x: activations.
        weight: codes, uint32 ``(out, in * bits / 32)``.
        scales: ``(out, in / group_size)``.
        biases: of the shape of `scales`, or None in modes that have none.
        stored: how the matrix is quantised.
    """

    def product(rows: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
        return mx.quantized_matmul(
            rows,
            weight,
            scales,
            biases,
            transpose=True,
            group_size=stored.group_size,
            bits=stored.bits,
            mode=stored.mode,
        )

    if not is_widening(x.dtype):
        return product(x, scales, biases)
    scales, biases = _wide(scales), _wide(biases) if biases is not None else None
    rows = x.reshape(-1, x.shape[-1])
    out = in_blocks(lambda part: product(_wide(part), scales, biases).astype(x.dtype), WIDE_ROWS, rows)
    return out.reshape(*x.shape[:-1], -1)


def gather_quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    stored: Quantization,
    *,
    experts: mx.array,
    rows: mx.array | None,
    is_sorted: bool,
) -> mx.array:
    """Multiply each row with the matrix of its expert.

    Args:
        x: ``(N, 1, in)``, or with `rows` any ``(..., 1, in)``.
        weight: codes of all experts, ``(E, out, in * bits / 32)``.
        scales: ``(E, out, in / group_size)``.
        biases: as `scales`, or None.
        stored: how the matrices are quantised.
        experts: which matrix, uint32 ``(N,)``, or any shape with `rows`.
        rows: which row of `x`, of the shape of `experts`; None pairs them one to one.
        is_sorted: whether `experts` never decreases.

    Returns:
        ``(*experts.shape, 1, out)``.
    """

    def product(
        some: mx.array, which: mx.array, scales: mx.array, biases: mx.array | None, rows: mx.array | None
    ) -> mx.array:
        return mx.gather_qmm(
            some,
            weight,
            scales,
            biases,
            lhs_indices=rows,
            rhs_indices=which,
            transpose=True,
            group_size=stored.group_size,
            bits=stored.bits,
            mode=stored.mode,
            sorted_indices=is_sorted,
        )

    if not is_widening(x.dtype):
        return product(x, experts, scales, biases, rows)
    scales, biases = _wide(scales), _wide(biases) if biases is not None else None
    if rows is not None:
        return product(_wide(x), experts, scales, biases, rows).astype(x.dtype)
    return in_blocks(
        lambda part, which: product(_wide(part), which, scales, biases, None).astype(x.dtype), WIDE_ROWS, x, experts
    )


def is_widening(dtype: mx.Dtype) -> bool:
    """Whether products of activations of this dtype are computed in float32."""
    return dtype != mx.float32 and mx.default_device().type == mx.cpu


def _wide(array: mx.array) -> mx.array:
    """In float32; codes and scales that are no floating-point numbers stay."""
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
