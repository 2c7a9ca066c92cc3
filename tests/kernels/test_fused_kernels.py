"""Every fused kernel against stock operations, in every size of the family and every dtype.

They run on Metal where there is Metal. Elsewhere MLX's generated source runs emulated, in several orders of threads,
and every access to memory is checked.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.bench.shapes import SHAPES
from lfm_mlx.kernels import (
    ADD_NORM,
    COMBINE_NORM,
    FUSED_KERNELS,
    KERNEL_NAMES,
    MAX_TOKENS,
    QK_NORM_ROPE,
    ROUTER,
    Case,
    FusedKernel,
    Routing,
)

pytestmark = pytest.mark.usefixtures("metal")

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
WIDTHS = sorted({shape["hidden_size"] for shape in SHAPES.values()})
HEADS = sorted({(s["num_attention_heads"], s["num_key_value_heads"]) for s in SHAPES.values()})
EXPERTS = sorted({(s["num_experts"], s["num_experts_per_tok"]) for s in SHAPES.values() if "num_experts" in s})

FLOAT32_TOLERANCE = 1e-5
SIXTEEN_BITS = {mx.bfloat16: (0.999, 1), mx.float16: (0.997, 2)}
"""Least share of equal values, and how many last bits apart the others may be.

float16 keeps eight times as many bits of the float32 sums, whose order differs, and rounds twice.
"""


def cases() -> list[tuple[FusedKernel, Case]]:
    """All kernels in all sizes and dtypes of the family."""
    found: list[tuple[FusedKernel, Case]] = []
    for dtype in DTYPES:
        found += [(ADD_NORM, Case.of(dtype, D=width)) for width in WIDTHS]
        found += [(QK_NORM_ROPE, Case.of(dtype, H=H, G=G, P=64)) for H, G in HEADS]
        found += [(ROUTER, Case.of(dtype, E=E, A=A, normalized=True)) for E, A in EXPERTS]
        for weighed in (True, False):
            found.append((COMBINE_NORM, Case.of(dtype, D=2048, A=4, weighed=weighed, normalized=not weighed)))
    return found


def name_of(value: Any) -> str:
    return value.name if isinstance(value, FusedKernel) else str(value).replace(" ", "-")


def last_bits(array: mx.array) -> np.ndarray:
    """The values of a 16-bit float numbered in their order, so that neighbours differ by one."""
    bits = np.array(array.view(mx.uint16)).astype(np.int64)
    return np.where(bits < 32768, bits, 32768 - bits)


def refuse_difference(found: mx.array, expected: mx.array) -> None:
    """Fail unless float32 agrees within rounding and 16-bit values agree but for a few last bits."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.dtype == mx.uint32:
        assert mx.array_equal(found, expected)
    elif found.dtype == mx.float32:
        error = mx.abs(found - expected).max() / mx.sqrt(mx.mean(mx.square(expected)))
        assert error.item() < FLOAT32_TOLERANCE
    else:
        share, most_apart = SIXTEEN_BITS[found.dtype]
        apart = np.abs(last_bits(found) - last_bits(expected))
        error = np.abs(np.array(found.astype(mx.float32)) - np.array(expected.astype(mx.float32)))
        # Where terms cancel, the float32 sum before the rounding is all that can be compared.
        is_cancelled = error <= FLOAT32_TOLERANCE * np.sqrt((np.array(expected.astype(mx.float32)) ** 2).mean())
        assert (apart == 0).mean() >= share
        assert apart[~is_cancelled].max(initial=0) <= most_apart


def norm_in_float64(rows: mx.array, weight: mx.array, eps: float) -> mx.array:
    """The norm with exact statistics and the usual two roundings; MLX's own sums less exactly on some backends."""
    wide = np.array(rows.astype(mx.float32)).astype(np.float64)
    scaled = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)
    return mx.array(scaled.astype(np.float32)).astype(rows.dtype) * weight


def compare(kernel: FusedKernel, arguments: tuple[Any, ...]) -> None:
    found = kernel.comparable(kernel.launch(*arguments))
    expected = list(kernel.comparable((kernel.exact or kernel.reference)(*arguments)))
    if kernel in (ADD_NORM, COMBINE_NORM):
        expected[1] = norm_in_float64(found[0], *arguments[-2:])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        refuse_difference(a, b)


@pytest.mark.parametrize(("kernel", "case"), cases(), ids=name_of)
def test_a_kernel_agrees_with_stock_operations(kernel: FusedKernel, case: Case) -> None:
    for num_rows, num_tokens in ((1, 1), (5, 1), (2, 3)):
        arguments = kernel.example(case, num_rows, num_tokens)
        assert kernel.case_of(*arguments) == case
        compare(kernel, arguments)


def test_every_kernel_has_a_name_that_the_environment_can_say() -> None:
    assert sorted(kernel.name for kernel in FUSED_KERNELS) == sorted(KERNEL_NAMES)


@pytest.mark.parametrize("width", [4, 36, 2052, 4096])
def test_rows_of_any_width_in_range_are_taken(width: int) -> None:
    compare(ADD_NORM, ADD_NORM.example(Case.of(mx.float32, D=width), 3, 1))
    compare(
        COMBINE_NORM, COMBINE_NORM.example(Case.of(mx.float32, D=width, A=3, weighed=False, normalized=False), 3, 1)
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 8), (3, 1, 70), (9, 3, 128)])
def test_heads_of_other_numbers_and_widths_are_rotated(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    case = Case.of(mx.float32, H=num_heads, G=num_kv_heads, P=head_dim)
    compare(QK_NORM_ROPE, QK_NORM_ROPE.example(case, 3, 2))


def test_each_row_is_rotated_from_its_own_position() -> None:
    case = Case.of(mx.float32, H=4, G=2, P=64)
    qkv, weight, _, theta, eps = QK_NORM_ROPE.example(case, 9, 1)
    offsets = mx.array([0, 1, 5, 99, 2, 50, 7, 7, 31], dtype=mx.int32)
    compare(QK_NORM_ROPE, (qkv, weight, offsets, theta, eps))
    together = QK_NORM_ROPE.launch(qkv, weight, offsets, theta, eps)
    for row in range(9):
        alone = QK_NORM_ROPE.launch(qkv[row : row + 1], weight, offsets[row], theta, eps)
        for a, b in zip(together, alone, strict=True):
            assert mx.array_equal(a[row : row + 1], b)
    assert not mx.array_equal(together[0], QK_NORM_ROPE.launch(qkv, weight, offsets[::-1], theta, eps)[0])


@pytest.mark.parametrize(("position", "tolerance"), [(0, 1e-6), (99, 1e-5), (31_999, 4e-3), (127_999, 2e-2)])
def test_positions_are_rotated_as_exactly_as_float32_can_hold_an_angle(position: int, tolerance: float) -> None:
    qkv, weight, _, theta, eps = QK_NORM_ROPE.example(Case.of(mx.float32, H=4, G=2, P=64), 1, 1)
    queries, keys, _ = QK_NORM_ROPE.launch(qkv, weight, mx.array(position), theta, eps)
    heads = np.array(qkv, dtype=np.float64).reshape(8, 64)[:6]
    normed = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + eps) * np.array(weight, dtype=np.float64)
    angles = position * theta ** -(np.arange(32) / 32)
    low, high = normed[:, :32], normed[:, 32:]
    expected = np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], axis=-1
    )
    found = np.concatenate([np.array(queries).reshape(4, 64), np.array(keys).reshape(2, 64)])
    assert np.abs(found - expected).max() / np.sqrt((expected**2).mean()) < tolerance


def test_stock_rotation_is_the_same_within_its_rounding_of_angles() -> None:
    arguments = QK_NORM_ROPE.example(Case.of(mx.float32, H=32, G=8, P=64), 5, 3)
    for found, stock in zip(QK_NORM_ROPE.launch(*arguments), QK_NORM_ROPE.reference(*arguments), strict=True):
        assert mx.abs(found - stock).max().item() < 1e-4


def test_equal_ranks_choose_the_first_experts() -> None:
    experts, weights, _ = ROUTER.launch(mx.zeros((2, 64)), None, 4, 1.0, True)
    assert experts.tolist() == [[0, 1, 2, 3]] * 2
    assert mx.allclose(weights, mx.full((2, 4), 0.25), rtol=1e-5)


def test_logits_that_are_no_numbers_still_choose_different_experts_that_exist() -> None:
    logits = mx.array([[float("nan")] * 32, [float("-inf")] * 31 + [1.0], [float("nan")] * 30 + [-5.0, float("inf")]])
    for bias in (mx.zeros((32,)), mx.full((32,), -2.0)):
        experts, _, _ = ROUTER.launch(logits, bias, 4, 1.0, True)
        assert all(len(set(row)) == 4 and max(row) < 32 for row in experts.tolist())
        assert 31 in experts[1].tolist()
        assert {30, 31} <= set(experts[2].tolist())


@pytest.mark.parametrize("is_normalized", [True, False])
def test_experts_that_hardly_weigh_anything_are_not_divided_by_zero(is_normalized: bool) -> None:
    logits = mx.full((1, 8), -14.0)
    _, weights, _ = ROUTER.launch(logits, None, 2, 1.0, is_normalized)
    weight = 1 / (1 + np.exp(14.0))
    expected = weight / (2 * weight + 1e-6) if is_normalized else weight
    assert mx.allclose(weights, mx.full((1, 2), expected), rtol=1e-4, atol=0)
    residual, outputs, norm = mx.zeros((1, 8)), mx.ones((1, 16)), mx.ones((8,))
    routing = Routing(mx.array([[0, 1]], dtype=mx.uint32), logits[:, :2], False)
    summed, _ = COMBINE_NORM.launch(residual, outputs, routing, 1.0, is_normalized, norm, 1e-5)
    assert mx.allclose(summed, mx.full((1, 8), 2 * expected), rtol=1e-4, atol=0)


def test_the_bias_chooses_experts_and_does_not_weigh_them() -> None:
    logits = mx.random.normal((3, 32), key=mx.random.key(7))
    bias = mx.zeros((32,))
    bias[5] = 10.0
    experts, weights, _ = ROUTER.launch(logits, bias, 1, 1.0, False)
    assert experts.tolist() == [[5]] * 3
    assert mx.allclose(weights[:, 0], mx.sigmoid(logits[:, 5]), rtol=1e-6)


OUT_OF_RANGE = {
    "a width that is no multiple of four": ADD_NORM.case_of(mx.zeros((1, 6)), mx.zeros((1, 6)), mx.zeros((6,)), 1e-5),
    "a row wider than a threadgroup": ADD_NORM.case_of(*(mx.zeros((1, 4100)),) * 2, mx.zeros((4100,)), 1e-5),
    "too many tokens": ADD_NORM.case_of(*(mx.zeros((MAX_TOKENS + 1, 8)),) * 2, mx.zeros((8,)), 1e-5),
    "unequal dtypes": ADD_NORM.case_of(mx.zeros((1, 8)), mx.zeros((1, 8)).astype(mx.bfloat16), mx.zeros((8,)), 1e-5),
    "a weight of another dtype": ADD_NORM.case_of(*(mx.zeros((1, 8)),) * 2, mx.zeros((8,)).astype(mx.float16), 1e-5),
    "too many experts": ROUTER.case_of(mx.zeros((1, 257)), None, 4, 1.0, True),
    "more experts at work than lanes": ROUTER.case_of(mx.zeros((1, 64)), None, 33, 1.0, True),
    "a bias that is not float32": ROUTER.case_of(mx.zeros((1, 8)), mx.zeros((8,)).astype(mx.float16), 2, 1.0, True),
    "positions that are not int32": QK_NORM_ROPE.case_of(
        mx.zeros((1, 1, 32)), mx.zeros((3, 8)), mx.array(0, dtype=mx.int64), 1e6, 1e-5
    ),
    "scores of another dtype": COMBINE_NORM.case_of(
        mx.zeros((1, 8)),
        mx.zeros((1, 16)),
        Routing(mx.zeros((1, 2)), mx.zeros((1, 2)).astype(mx.bfloat16), False),
        1.0,
        True,
        mx.zeros((8,)),
        1e-5,
    ),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_what_is_out_of_range_is_left_to_stock_operations(name: str) -> None:
    assert OUT_OF_RANGE[name] is None
