"""Matrices and stacks of matrices, stored plainly or in quantised groups.

Constructors take arrays that exist; nothing here makes random weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.config import Quantization
from lfm_mlx.kernels import gather_quantized_matmul, quantized_matmul


class Linear(Module):
    """``x @ weight.T + bias`` with `weight` ``(out, in)``."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        super().__init__()
        self.weight = weight
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``(..., in)`` to ``(..., out)``."""
        if "bias" in self:
            return mx.addmm(self.bias, x, self.weight.T)
        return x @ self.weight.T


class QuantizedLinear(Module):
    """A `Linear` whose weight is stored in quantised groups."""

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        stored: Quantization,
        bias: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        if biases is not None:
            self.biases = biases
        if bias is not None:
            self.bias = bias
        self.stored = stored

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``(..., in)`` to ``(..., out)``."""
        y = quantized_matmul(x, self.weight, self.scales, self.get("biases"), self.stored)
        return y + self.bias if "bias" in self else y


class SplitLinear(Module):
    """Several matrices on one input, for parts whose storage differs so that they cannot be one matrix."""

    def __init__(self, parts: Sequence[AnyLinear]) -> None:
        super().__init__()
        self.parts = list(parts)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``(..., in)`` to the parts' outputs side by side."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


class Embedding(Module):
    """A table of token vectors ``(V, D)`` that can serve as output head too."""

    def __init__(self, table: Linear | QuantizedLinear) -> None:
        super().__init__()
        self.table = table

    def __call__(self, tokens: mx.array) -> mx.array:
        """Look up tokens ``(B, L)``: ``(B, L, D)``."""
        table = self.table
        if isinstance(table, Linear):
            return table.weight[tokens]
        stored = table.stored
        biases = table.get("biases")
        return mx.dequantize(
            table.weight[tokens],
            table.scales[tokens],
            biases[tokens] if biases is not None else None,
            group_size=stored.group_size,
            bits=stored.bits,
            mode=stored.mode,
            dtype=table.scales.dtype if biases is not None else None,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``(..., V)`` of hidden states ``(..., D)``."""
        return self.table(x)


class ExpertLinear(Module):
    """One matrix an expert, ``(E, out, in)``, of which each row of the input uses its own."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(
        self, x: mx.array, experts: mx.array, rows: mx.array | None = None, *, is_sorted: bool = False
    ) -> mx.array:
        """Multiply each row by its expert's matrix.

        Args:
            x: ``(N, 1, in)``.
            experts: which expert, uint32; ``(N,)``, or any shape when `rows` is given.
            rows: which row of `x`, of the shape of `experts`; None pairs them one to one.
            is_sorted: whether `experts` never decreases.

        Returns:
            ``(*experts.shape, 1, out)``.
        """
        weight = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, weight, lhs_indices=rows, rhs_indices=experts, sorted_indices=is_sorted)


class QuantizedExpertLinear(Module):
    """An `ExpertLinear` whose matrices are stored in quantised groups."""

    def __init__(self, weight: mx.array, scales: mx.array, biases: mx.array | None, stored: Quantization) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        if biases is not None:
            self.biases = biases
        self.stored = stored

    def __call__(
        self, x: mx.array, experts: mx.array, rows: mx.array | None = None, *, is_sorted: bool = False
    ) -> mx.array:
        """As `ExpertLinear.__call__`."""
        return gather_quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            self.stored,
            experts=experts,
            rows=rows,
            is_sorted=is_sorted,
        )


class SplitExpertLinear(Module):
    """Several `ExpertLinear` on one input, for parts whose storage differs so that they cannot be one stack."""

    def __init__(self, parts: Sequence[AnyExpertLinear]) -> None:
        super().__init__()
        self.parts = list(parts)

    def __call__(
        self, x: mx.array, experts: mx.array, rows: mx.array | None = None, *, is_sorted: bool = False
    ) -> mx.array:
        """As `ExpertLinear.__call__`, the parts' outputs side by side."""
        return mx.concatenate([part(x, experts, rows, is_sorted=is_sorted) for part in self.parts], axis=-1)


AnyLinear = Linear | QuantizedLinear | SplitLinear
AnyExpertLinear = ExpertLinear | QuantizedExpertLinear | SplitExpertLinear


def equal_parts(x: mx.array, count: int) -> list[mx.array]:
    """The last axis in `count` equal slices: what `mx.split` gives, at a fraction of its cost to build."""
    width = x.shape[-1] // count
    return [x[..., i * width : (i + 1) * width] for i in range(count)]
