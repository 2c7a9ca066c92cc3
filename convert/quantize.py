"""Rows of a matrix in the formats that MLX computes with."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.config import Quantization
from lfm_mlx.errors import ConversionError

from .rounding import search_affine

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Types that unquantised tensors can be given, and safetensors' names for them."""

DTYPES_OF_CODES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
"""MLX's types by safetensors' names."""


def quantize_rows(
    rows: mx.array, how: Quantization, search: bool = False, importance: mx.array | None = None
) -> list[mx.array]:
    """Rows of a matrix in their stored form, not yet evaluated.

    Args:
        rows: (..., in), any float type; `in` divides into groups.
        how: group size, bits and mode.
        search: look for the scale and bias of least squared error (mode affine only); otherwise MLX's own rule.
        importance: float32 (in,), the weight of each column in that error.

    Returns:
        Packed values as uint32, scales and, in mode affine, biases. Affine scales and biases keep the type of `rows`;
        the other modes have uint8 scales.
    """
    if search and how.mode == "affine":
        return list(search_affine(rows, how.group_size, how.bits, importance))
    return list(mx.quantize(rows, group_size=how.group_size, bits=how.bits, mode=how.mode))


def check_float16(name: str, array: mx.array) -> None:
    """Refuse values that float16 cannot hold. Evaluates `array`.

    Raises:
        ConversionError: a value of `array` would become infinite.
    """
    if not mx.isfinite(array.astype(mx.float16)).all().item():
        raise ConversionError(
            f"{name}: holds values that float16 cannot represent, expected at most 65,504; convert to bfloat16"
        )
