"""Copies that a step makes without having asked: where a kernel cannot read its input's layout, it copies it first.

A graph does not show them, so the layout of every array is followed from the inputs on, by the rules of MLX's Metal
sources (mlx/backend/common/utils and slicing; backend/metal/quantized, normalization, rope,
scaled_dot_product_attention, conv, softmax). The graph followed is the uncompiled one: fusing elementwise operations
changes no layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Dims = tuple[int, ...]

_SCANS = ("attention", "quantize", "norm", "rope")
"""What the scans of `lfm_mlx.bench.launches.stand_ins` stand for, by MLX's number of the reduction."""

_SAME = frozenset({"Depends", "StopGradient", "Copy", "CustomTransforms"})
_NEEDS_ROWS = frozenset({"Convolution", "CustomKernel"})
_NEEDS_LAST_AXIS = frozenset({"Softmax", "LogSumExp"})
_NEEDS_MATRIX = frozenset({"QuantizedMatmul", "GatherQMM"})
_STRIDED = frozenset(
    {"Gather", "GatherAxis", "ArgPartition", "Concatenate", "SliceUpdate", "ScatterAxis", "Scatter", "Sort"}
)


@dataclass(frozen=True)
class Layout:
    """How an array lies in memory; strides in elements, those of axes of length 1 mean nothing."""

    shape: Dims
    strides: Dims

    @classmethod
    def rows(cls, shape: Sequence[int]) -> Layout:
        """Row after row without gaps."""
        return cls(tuple(shape), tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))

    @property
    def is_rows(self) -> bool:
        """Whether rows lie one after the other without gaps."""
        wanted = Layout.rows(self.shape).strides
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def is_gapless(self) -> bool:
        """Whether it covers its stretch of memory, in whatever order."""
        axes = [(n, stride) for n, stride in zip(self.shape, self.strides, strict=True) if n > 1 and stride]
        return math.prod(n for n, _ in axes) == 1 + sum((n - 1) * stride for n, stride in axes)

    def stride(self, axis: int) -> int:
        """The stride of an axis, that of a row-contiguous array where the axis has length 1."""
        return self.strides[axis] if self.shape[axis] > 1 else Layout.rows(self.shape).strides[axis]


def count_copies(build: Callable[[mx.array], Sequence[mx.array]], tokens: mx.array) -> int:
    """Hidden copies in the step that `build` makes from `tokens`. Nothing is evaluated.

    Call it within `stand_ins(are_kernels_real=True)`, so that the inputs of fused kernels are looked at too.
    Nodes that are alike are counted once, as MLX merges them when it shows a graph with its shapes.
    """
    records: list[dict[str, Any]] = []
    mx.disable_compile()
    try:
        mx.export_function(records.append, lambda x: list(build(x)), tokens)
    finally:
        mx.enable_compile()
    layouts: dict[str, Layout] = {}
    copies = 0
    for record in records:
        if record["type"] == "primitive":
            inputs = [layouts.get(name) or Layout.rows(shape) for name, shape, _ in record["inputs"]]
            shapes = [tuple(shape) for _, shape, _ in record["outputs"]]
            made, copied = follow(record["name"], record["arguments"], inputs, shapes)
            copies += copied
            layouts.update((name, layout) for (name, *_), layout in zip(record["outputs"], made, strict=True))
    return copies


def follow(
    name: str, arguments: Sequence[Any], inputs: Sequence[Layout], shapes: Sequence[Dims]
) -> tuple[list[Layout], int]:
    """The layouts an operation's outputs have on Metal, and the copies of inputs that it makes first."""
    first = inputs[0] if inputs else None
    if first is None:
        return [Layout.rows(shape) for shape in shapes], 0
    if name == "Scan":
        return _stand_in(_SCANS[arguments[0]], inputs, shapes[0])
    if name in _SAME:
        return list(inputs[: len(shapes)]), 0
    if name in ("Reshape", "Flatten", "Unflatten"):
        seen = reshaped(first, shapes[0])
        return [seen or Layout.rows(shapes[0])], 0 if seen else 1
    if name in _VIEWS:
        return [_VIEWS[name](first, arguments, shape) for shape in shapes], 0
    copies = 0
    if name in _NEEDS_MATRIX:
        copies = 0 if len(first.shape) < 2 or (first.stride(-1) == 1 and first.stride(-2) == first.shape[-1]) else 1
    elif name in _NEEDS_ROWS:
        copies = sum(not layout.is_rows for layout in inputs)
    elif name in _NEEDS_LAST_AXIS:
        copies = 0 if first.is_gapless and first.stride(-1) == 1 else 1
    elif name not in _STRIDED and all(layout == first for layout in inputs) and first.is_gapless:
        return [first if shape == first.shape else Layout.rows(shape) for shape in shapes], 0
    return [Layout.rows(shape) for shape in shapes], copies


def reshaped(layout: Layout, shape: Dims) -> Layout | None:
    """The same memory seen in another shape; None where only a copy can have it."""
    if layout.is_rows:
        return Layout.rows(shape)
    runs: list[list[int]] = []  # length and last stride of stretches that can be cut anywhere
    for i, n in enumerate(layout.shape):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * layout.strides[i]:
            runs[-1] = [runs[-1][0] * n, layout.strides[i]]
        else:
            runs.append([n, layout.strides[i]])
    strides = []
    for n in reversed(shape):
        if n == 1:
            strides.append(1)
            continue
        while runs and runs[-1][0] == 1:
            runs.pop()
        if not runs or runs[-1][0] % n:
            return None
        strides.append(runs[-1][1])
        runs[-1] = [runs[-1][0] // n, runs[-1][1] * n]
    return Layout(shape, tuple(reversed(strides)))


def _stand_in(kind: str, inputs: Sequence[Layout], shape: Dims) -> tuple[list[Layout], int]:
    first = inputs[0]
    if kind == "norm":
        is_kept = first.is_gapless and first.stride(-1) == 1
        is_kept &= len(shape) < 2 or shape[-2] == 1 or first.strides[-2] in (0, shape[-1])
        return [first if is_kept else Layout.rows(shape)], 0 if is_kept else 1
    if kind == "rope":
        return [Layout.rows(shape)], 0 if first.is_rows or _is_rope_readable(first) else 1
    if kind == "attention":
        return [Layout.rows(shape)], 0 if shape[2] > 8 or _is_query_readable(first) else 1
    return [Layout.rows(shape)], 0 if first.is_rows else 1


def _is_rope_readable(layout: Layout) -> bool:
    leading = layout.shape[:-3]
    if all(n == 1 for n in leading):
        return True
    if len(layout.shape) != 4:
        return False
    _, N, T, P = layout.shape
    return layout.stride(0) == T * N * P and layout.stride(1) == P and layout.stride(2) == N * P


def _is_query_readable(layout: Layout) -> bool:
    if layout.is_rows:
        return True
    B, H, _, P = layout.shape
    if B != 1 and H != 1:
        return False
    axis = 1 if B == 1 else 0
    return layout.stride(3) == 1 and layout.strides[2] == P * layout.shape[axis] and layout.strides[axis] == P


def _transposed(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    return Layout(shape, tuple(layout.strides[axis] for axis in arguments[0]))


def _sliced(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    return Layout(shape, tuple(a * b for a, b in zip(layout.strides, arguments[2], strict=True)))


def _split(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    return Layout(shape, layout.strides)


def _squeezed(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    gone = {axis % len(layout.shape) for axis in arguments[0]}
    return Layout(shape, tuple(stride for i, stride in enumerate(layout.strides) if i not in gone))


def _expanded(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    added = {axis % len(shape) for axis in arguments[0]}
    rest = iter(layout.strides)
    return Layout(shape, tuple(1 if i in added else next(rest) for i in range(len(shape))))


def _broadcast(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    missing = len(shape) - len(layout.shape)
    strides = [0] * missing
    for n, wide, stride in zip(layout.shape, shape[missing:], layout.strides, strict=True):
        strides.append(stride if n == wide else 0)
    return Layout(shape, tuple(strides))


def _as_strided(layout: Layout, arguments: Sequence[Any], shape: Dims) -> Layout:
    return Layout.rows(shape)  # only stand-ins use it, for an output that a kernel writes


_VIEWS: dict[str, Callable[[Layout, Sequence[Any], Dims], Layout]] = {
    "AsStrided": _as_strided,
    "Broadcast": _broadcast,
    "ExpandDims": _expanded,
    "Slice": _sliced,
    "Split": _split,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "View": lambda layout, arguments, shape: Layout.rows(shape),
}
