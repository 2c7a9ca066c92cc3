"""The arithmetic between matmuls against NumPy in float64, in float32 and in 16 bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_models import relative_error

from lfm_mlx.kernels import combine_experts, gated_conv, rank_experts, silu_multiply

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
BROKEN = 0.05
NUM_TOKENS, WIDTH, NUM_EXPERTS = 37, 24, 8


def drawn(*shape: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def exact(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def tolerance(dtype: mx.Dtype, num_roundings: int = 1) -> float:
    """What a result may differ by, relative to its largest magnitude, when it is rounded so often to `dtype`."""
    return 1e-6 if dtype == mx.float32 else num_roundings * mx.finfo(dtype).eps / 2 + 1e-6


@DTYPES
def test_silu_multiply_is_gate_times_its_sigmoid_times_up(dtype):
    gate, up = (drawn(2, NUM_TOKENS, WIDTH, seed=seed, dtype=dtype) for seed in (0, 1))
    found = silu_multiply(gate, up)
    assert found.dtype == dtype
    g, u = exact(gate), exact(up)
    assert relative_error(exact(found), g * sigmoid(g) * u) < tolerance(dtype, 3)
    assert relative_error(exact(found), u * sigmoid(u) * g) > BROKEN


@pytest.mark.parametrize("num_taps", [2, 3, 5])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, NUM_TOKENS, WIDTH), (3, 1, 1, WIDTH)], ids=["call", "step"])
@DTYPES
def test_gated_conv_weighs_each_window_with_its_tap_and_rounds_once(dtype, shape, has_bias, num_taps):
    gate = drawn(*shape, seed=0, dtype=dtype)
    windows = [drawn(*shape, seed=1 + i, dtype=dtype) for i in range(num_taps)]
    taps = [drawn(WIDTH, seed=10 + i) for i in range(num_taps)]
    bias = drawn(WIDTH, seed=20, dtype=dtype) if has_bias else None
    found = gated_conv(gate, windows, taps, bias)
    assert found.dtype == dtype

    def expected(taps: list[mx.array], bias: mx.array | None) -> np.ndarray:
        total = sum(exact(window) * exact(tap) for window, tap in zip(windows, taps, strict=True))
        return exact(gate) * (total + (exact(bias) if bias is not None else 0))

    assert relative_error(exact(found), expected(taps, bias)) < tolerance(dtype)
    assert relative_error(exact(found), expected(taps[::-1], bias)) > BROKEN
    if has_bias:
        assert relative_error(exact(found), expected(taps, None)) > BROKEN


@pytest.mark.parametrize("has_bias", [False, True])
@DTYPES
def test_experts_are_ranked_by_sigmoid_plus_bias_in_float32(dtype, has_bias):
    logits = drawn(NUM_TOKENS, NUM_EXPERTS, seed=0, dtype=dtype)
    bias = drawn(NUM_EXPERTS, seed=1) if has_bias else None
    found = rank_experts(logits, bias)
    assert found.dtype == mx.float32
    scores = sigmoid(exact(logits))
    expected = scores + (exact(bias) if bias is not None else 0)
    assert np.abs(exact(found) - expected).max() < tolerance(dtype)
    if bias is not None:
        assert relative_error(exact(found), scores) > BROKEN
        in_the_logits_dtype = (mx.sigmoid(logits) + bias.astype(dtype)).astype(mx.float32)
        assert mx.array_equal(found, in_the_logits_dtype) == (dtype == mx.float32)


@pytest.mark.parametrize("normalize_weights", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
@pytest.mark.parametrize("num_active", [1, 3, 8])
@pytest.mark.parametrize("shape", [(NUM_TOKENS,), (NUM_TOKENS, 1, 1)], ids=["call", "step"])
@DTYPES
def test_experts_are_weighed_added_to_the_residual_and_rounded_once(
    dtype, shape, num_active, scaling_factor, normalize_weights
):
    residual = drawn(*shape, WIDTH, seed=0, dtype=dtype)
    outputs = [drawn(*shape, WIDTH, seed=1 + i, dtype=dtype) for i in range(num_active)]
    logits = [drawn(*shape, 1, seed=20 + i, dtype=dtype) for i in range(num_active)]
    found = combine_experts(residual, outputs, logits, scaling_factor, normalize_weights)
    assert found.dtype == dtype
    assert found.shape == residual.shape

    def expected(*, scaling_factor: float = scaling_factor, is_normalised: bool = normalize_weights) -> np.ndarray:
        weights = [sigmoid(exact(logit)) for logit in logits]
        total = sum(weight * exact(output) for weight, output in zip(weights, outputs, strict=True))
        return exact(residual) + scaling_factor * total / ((sum(weights) + 1e-6) if is_normalised else 1)

    assert relative_error(exact(found), expected()) < tolerance(dtype)
    assert relative_error(exact(found), expected(is_normalised=not normalize_weights)) > BROKEN
    assert relative_error(exact(found), expected(scaling_factor=1.3)) > BROKEN


def test_control_a_sum_in_bfloat16_is_noticed():
    residual = drawn(NUM_TOKENS, WIDTH, seed=0, dtype=mx.bfloat16)
    outputs = [drawn(NUM_TOKENS, WIDTH, seed=1 + i, dtype=mx.bfloat16) for i in range(8)]
    logits = [drawn(NUM_TOKENS, 1, seed=20 + i, dtype=mx.bfloat16) for i in range(8)]
    in_16_bits = sum(mx.sigmoid(logit) * output for logit, output in zip(logits, outputs, strict=True)) + residual
    in_float32 = combine_experts(residual, outputs, logits, 1.0, False)
    assert in_16_bits.dtype == mx.bfloat16
    assert relative_error(exact(in_16_bits), exact(in_float32)) > tolerance(mx.bfloat16)
