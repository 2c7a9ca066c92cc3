"""Faults planted in the sources of the fused kernels: the tests of `test_fused_kernels.py` catch every one."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import pytest
from metal.emulation import KernelFaultError
from test_fused_kernels import compare

from lfm_mlx.kernels import ADD_NORM, COMBINE_NORM, QK_NORM_ROPE, ROUTER, Case, FusedKernel

pytestmark = [
    pytest.mark.usefixtures("metal"),
    pytest.mark.skipif(mx.metal.is_available(), reason="faults are planted in emulated kernels, not on a device"),
]

CASES: dict[FusedKernel, Case] = {
    ADD_NORM: Case.of(mx.float32, D=136),
    COMBINE_NORM: Case.of(mx.float32, D=136, A=3, weighed=False, normalized=True),
    QK_NORM_ROPE: Case.of(mx.float32, H=4, G=2, P=64),
    ROUTER: Case.of(mx.float32, E=40, A=4, normalized=True),
}

BARRIER = "  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n"

MUTATIONS: list[tuple[FusedKernel, str, str]] = [
    (ADD_NORM, BARRIER, ""),
    (ADD_NORM, "mem_flags::mem_threadgroup", "mem_flags::mem_none"),
    (ADD_NORM, "lane < num_simdgroups", "lane <= num_simdgroups"),
    (ADD_NORM, "if (lane == 0) {", "{"),
    (
        ADD_NORM,
        "if (first < width) {\n    for (int i = 0; i < 4; i++) {\n      values",
        "{ for (int i = 0; i < 4; i++) {\n values",
    ),
    (ADD_NORM, "i < 4; i++) {\n      sum", "i < 3; i++) {\n      sum"),
    (ADD_NORM, "sum[start + i]", "sum[first + i]"),
    (ADD_NORM, "weight[first + i]", "weight[start + i]"),
    (ADD_NORM, "total / width + eps", "total / width"),
    (ADD_NORM, "float(residual[start + i]) + float(update[start + i])", "float(residual[start + i])"),
    (COMBINE_NORM, BARRIER, ""),
    (COMBINE_NORM, "(row * A + a) * width", "(a * A + row) * width"),
    (COMBINE_NORM, "scores[row * A + a]", "scores[row * A + a + 1]"),
    (COMBINE_NORM, "factor_sum += factors[a];", ""),
    (COMBINE_NORM, "a < A; a++) {\n        update", "a + 1 < A; a++) {\n        update"),
    (COMBINE_NORM, "factors[A]", "factors[A - 1]"),
    (COMBINE_NORM, "float update = 0.0f;", "float update;"),
    (QK_NORM_ROPE, "a * c - b * s", "a * c + b * s"),
    (QK_NORM_ROPE, "b * c + a * s", "a * c + b * s"),
    (QK_NORM_ROPE, "y[i + HALF]", "y[2 * i + 1]"),
    (QK_NORM_ROPE, "i < HALF) {\n      low", "i + 1 < HALF) {\n      low"),
    (QK_NORM_ROPE, "offsets_shape[0] == 1 ? 0 : row", "0"),
    (QK_NORM_ROPE, "offsets_shape[0] == 1 ? 0 : row", "token"),
    (QK_NORM_ROPE, "weight[head * P + i]", "weight[i]"),
    (QK_NORM_ROPE, "head - num_heads", "head"),
    (QK_NORM_ROPE, "+ column);", ");"),
    (QK_NORM_ROPE, "metal::simd_sum(squares)", "squares"),
    (ROUTER, "lane + 32 * n;\n    if (e < E) {", "lane + 32 * n;\n    {"),
    (ROUTER, "ranks[n] > best", "ranks[n] < best"),
    (ROUTER, "taken |= 1u << (winner / 32);", ""),
    (ROUTER, "score + bias[e]", "score"),
    (ROUTER, "float best = -INFINITY;", "float best = 0.0f;"),
    (ROUTER, "a < A; a++", "a + 1 < A; a++"),
    (ROUTER, "lane < A ? 1.0f", "lane <= A ? 1.0f"),
    (ROUTER, "total + sum_eps", "1.0f"),
    (ROUTER, "if (lane < A) {\n    experts", "{\n    experts"),
    (ROUTER, "if (lane == a) {", "if (lane == 0) {"),
]


def compare_shapes(kernel: FusedKernel) -> None:
    for num_rows, num_tokens in ((2, 3), (5, 1)):
        compare(kernel, kernel.example(CASES[kernel], num_rows, num_tokens))


@pytest.mark.parametrize(("kernel", "right", "wrong"), MUTATIONS, ids=lambda value: getattr(value, "name", "to"))
def test_a_planted_fault_is_caught(
    kernel: FusedKernel, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: Any = importlib.import_module(f"lfm_mlx.kernels.{kernel.name}").KERNEL
    part = "source" if right in compiled.source else "header"
    assert right in getattr(compiled, part)
    monkeypatch.setattr(compiled, part, getattr(compiled, part).replace(right, wrong, 1))
    with pytest.raises((KernelFaultError, AssertionError)) as caught:
        compare_shapes(kernel)
    assert "does not compile" not in str(caught.value)


@pytest.mark.parametrize("kernel", CASES, ids=lambda kernel: kernel.name)
def test_without_a_fault_the_same_comparison_passes(kernel: FusedKernel) -> None:
    compare_shapes(kernel)
