"""Quantised products in 16 bits: on the CPU they are computed in float32, a few rows at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.config import Quantization
from lfm_mlx.kernels import gather_quantized_matmul, quantized_matmul, quantized_products

STORED = [
    Quantization(group_size=32, bits=4, mode="affine"),
    Quantization(group_size=64, bits=8, mode="affine"),
    Quantization(group_size=32, bits=4, mode="mxfp4"),
]

D, F, E = 64, 96, 5


def matrices(stored: Quantization, *outer: int) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    """Codes, scales, biases, and what they stand for."""
    weight = mx.random.normal((*outer, F, D), key=mx.random.key(0)).astype(mx.bfloat16)
    codes, scales, *biases = mx.quantize(weight, stored.group_size, stored.bits, stored.mode)
    bias = biases[0] if biases else None
    wide = [part.astype(mx.float32) if part is not None and bias is not None else part for part in (scales, bias)]
    whole = mx.dequantize(
        codes, *wide, group_size=stored.group_size, bits=stored.bits, mode=stored.mode, dtype=mx.float32
    )
    return codes, scales, bias, whole


def assert_rounded(found: mx.array, exact: mx.array) -> None:
    """`found` is `exact` rounded to bfloat16, give or take one rounding where they lie close."""
    assert found.dtype == mx.bfloat16
    assert found.shape == exact.shape
    a, b = np.array(found.astype(mx.float32)), np.array(exact)
    assert np.abs(a - b).max() <= 2**-7 * np.abs(b).max()
    assert np.abs(a - b).mean() <= 2**-9 * np.abs(b).mean() * 2
    assert np.abs(np.roll(a, 1, axis=-1) - b).mean() > 0.1 * np.abs(b).mean()


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: f"{stored.mode} {stored.bits}")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3), (1, 600)])
def test_a_16_bit_product_is_the_float32_one_rounded_once(stored: Quantization, shape: tuple[int, ...]) -> None:
    codes, scales, biases, whole = matrices(stored)
    x = mx.random.normal((*shape, D), key=mx.random.key(1)).astype(mx.bfloat16)
    found = quantized_matmul(x, codes, scales, biases, stored)
    assert_rounded(found, x.astype(mx.float32) @ whole.T)


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: f"{stored.mode} {stored.bits}")
@pytest.mark.parametrize("count", [7, 600])
def test_rows_with_an_expert_each(stored: Quantization, count: int) -> None:
    codes, scales, biases, whole = matrices(stored, E)
    x = mx.random.normal((count, 1, D), key=mx.random.key(1)).astype(mx.bfloat16)
    experts = mx.sort(mx.random.randint(0, E, (count,), key=mx.random.key(2))).astype(mx.uint32)
    found = gather_quantized_matmul(x, codes, scales, biases, stored, experts=experts, rows=None, is_sorted=True)
    assert_rounded(found, x.astype(mx.float32) @ whole[experts].swapaxes(-1, -2))


def test_tokens_with_several_experts_each() -> None:
    stored = STORED[0]
    codes, scales, biases, whole = matrices(stored, E)
    x = mx.random.normal((3, 1, 1, D), key=mx.random.key(1)).astype(mx.bfloat16)
    experts = mx.array([[0, 4], [1, 2], [4, 3]], dtype=mx.uint32)
    rows = mx.array([[0, 0], [1, 1], [2, 2]], dtype=mx.uint32)
    found = gather_quantized_matmul(x, codes, scales, biases, stored, experts=experts, rows=rows, is_sorted=False)
    assert_rounded(found, x.astype(mx.float32) @ whole[experts].swapaxes(-1, -2))


def test_float32_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = STORED[0]
    codes, scales, biases, _ = matrices(stored)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32) if biases is not None else None
    x = mx.random.normal((600, D), key=mx.random.key(1))
    expected = mx.quantized_matmul(x, codes, scales, biases, transpose=True, group_size=32, bits=4)
    assert mx.array_equal(quantized_matmul(x, codes, scales, biases, stored), expected)
    monkeypatch.setattr(quantized_products, "is_widening", lambda dtype: True)
    assert mx.allclose(quantized_matmul(x, codes, scales, biases, stored), expected, atol=1e-5)
