"""From one tensor of ours to the tensors that are written for it."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.config import Quantization
from lfm_mlx.errors import ConversionError

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
"""Types that unquantised tensors can be given."""


def quantize(name: str, weight: mx.array, how: Quantization) -> dict[str, mx.array]:
    """The stored form of the matrix ``X.weight``, not yet evaluated.

    Args:
        name: our name, ending in ``.weight``.
        weight: (..., out, in), any float type; `in` divides into groups.
        how: group size, bits and mode.

    Returns:
        ``X.weight`` packed into uint32, ``X.scales`` and, in mode affine, ``X.biases``. Affine scales and biases keep
        the type of `weight`; the other modes have uint8 scales.
    """
    path = name.removesuffix(".weight")
    packed = mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode)
    return {f"{path}.{part}": array for part, array in zip(("weight", "scales", "biases"), packed, strict=False)}


def cast(name: str, array: mx.array, dtype: str | None) -> mx.array:
    """`array` as `dtype` (None: as it is stored); expert biases are float32 always, since they decide near-ties."""
    if name.endswith("expert_bias"):
        return array.astype(mx.float32)
    return array if dtype is None else array.astype(DTYPES[dtype])


def check_float16(name: str, array: mx.array) -> None:
    """Refuse values that float16 cannot hold. Evaluates `array`.

    Raises:
        ConversionError: a value of `array` would become infinite.
    """
    if not mx.isfinite(array.astype(mx.float16)).all().item():
        raise ConversionError(
            f"{name}: holds values that float16 cannot represent, expected at most 65,504; convert to bfloat16"
        )
