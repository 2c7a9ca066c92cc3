"""The address spaces of the fused kernels' pointers, which neither MLX nor the emulator looks at."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from metal.address_spaces import refused
from metal.translation import generated

from lfm_mlx.kernels import ADD_NORM, COMBINE_NORM, QK_NORM_ROPE, ROUTER, Case, FusedKernel, MetalKernel
from lfm_mlx.kernels.metal_kernel import built

pytest.importorskip("clang.cindex", reason="libclang is not installed")

CASES: list[tuple[FusedKernel, Case]] = [
    (ADD_NORM, Case.of(mx.float32, D=64)),
    (ADD_NORM, Case.of(mx.float32, D=4)),  # arrays of fewer than eight values are in constant memory
    (COMBINE_NORM, Case.of(mx.float32, D=64, A=4, weighed=True, normalized=False)),
    (COMBINE_NORM, Case.of(mx.float32, D=4, A=1, weighed=False, normalized=True)),
    (QK_NORM_ROPE, Case.of(mx.float32, H=4, G=2, P=64)),
    (QK_NORM_ROPE, Case.of(mx.float32, H=1, G=1, P=2)),
    (ROUTER, Case.of(mx.float32, E=32, A=4, normalized=True)),
    (ROUTER, Case.of(mx.float32, E=6, A=2, normalized=False)),
]


class _SeenError(Exception):
    """Carries a kernel's source out of the call that would launch it."""


def source_of(kernel: FusedKernel, case: Case, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Metal source that MLX generates for a launch."""

    def see(self: MetalKernel, inputs: Sequence[mx.array], **call: Any) -> Any:
        made = built(self.name, tuple(self.inputs), tuple(self.outputs), self.source, self.header)
        raise _SeenError(generated(made, inputs, call).source)

    with monkeypatch.context() as during:
        during.setattr(MetalKernel, "launch", see)
        with pytest.raises(_SeenError) as seen:
            kernel.launch(*kernel.example(case, num_rows, 1))
    return str(seen.value)


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize(("kernel", "case"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_address_spaces_are_right(
    kernel: FusedKernel, case: Case, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(source_of(kernel, case, num_rows, monkeypatch)) == []


FAULTS = [
    (ADD_NORM, "header", "threadgroup float* partial", "device float* partial", "group_sum"),
    (ADD_NORM, "source", "T values[4];", "device T* other = residual; T values[4];", "const __global float"),
    (
        ADD_NORM,
        "source",
        "T values[4];",
        "const device int* n = weight_shape; T values[4];",
        "const __constant int",
    ),
    (ADD_NORM, "source", "T values[4];", "T values[4]; thread T* own = partial;", "__local float"),
    (QK_NORM_ROPE, "source", "device T* y", "threadgroup T* y", "__local float"),
    (QK_NORM_ROPE, "source", "T low[PAIRS];", "T low[PAIRS]; const device int* at = offsets;", "const __constant int"),
]


@pytest.mark.parametrize(("kernel", "part", "right", "wrong", "told"), FAULTS)
def test_a_pointer_into_another_address_space_is_refused(
    kernel: FusedKernel, part: str, right: str, wrong: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = importlib.import_module(f"lfm_mlx.kernels.{kernel.name}").KERNEL
    assert right in getattr(compiled, part)
    monkeypatch.setattr(compiled, part, getattr(compiled, part).replace(right, wrong, 1))
    case = {ADD_NORM: CASES[0][1], QK_NORM_ROPE: CASES[4][1]}[kernel]
    problems = refused(source_of(kernel, case, 1, monkeypatch))
    assert problems
    assert told in problems[0]
