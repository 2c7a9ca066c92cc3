"""The gated short convolution (transformers ``Lfm2ShortConv``)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.cache import ConvState, Span
from lfm_mlx.kernels import gated_conv, in_blocks, is_compiling
from lfm_mlx.model.linear import AnyLinear, equal_parts

BLOCK_TOKENS = 256
"""Tokens whose float32 values exist at the same time where the convolution is not compiled to one kernel."""


class ShortConv(Module):
    """``out(C * conv(B * x))`` with ``B, C, x = in(u)`` and a causal depthwise convolution of W taps.

    Args:
        in_proj: ``(3 D, D)``.
        taps: W arrays ``(D,)``, float32; the last one multiplies the current token.
        bias: ``(D,)`` added to the convolution, or None.
        out_proj: ``(D, D)``.
    """

    def __init__(
        self, in_proj: AnyLinear, taps: Sequence[mx.array], bias: mx.array | None, out_proj: AnyLinear
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.taps = list(taps)
        if bias is not None:
            self.bias = bias
        self.out_proj = out_proj

    def __call__(self, x: mx.array, state: ConvState | None, span: Span) -> mx.array:
        """Map ``(B, L, D)`` to ``(B, L, D)`` and move `state` on."""
        num_tokens = span.num_tokens
        gate_in, gate_out, value = equal_parts(self.in_proj(x), 3)
        gated = gate_in * value
        num_rows = len(self.taps) - 1
        seen = state.extend(gated, span) if state is not None else mx.pad(gated, [(0, 0), (num_rows, 0), (0, 0)])
        windows = [seen[:, i : i + num_tokens] for i in range(num_rows + 1)]
        return self.out_proj(self._convolve(gate_out, windows))

    def step(self, x: mx.array, rows: Sequence[mx.array]) -> tuple[mx.array, tuple[mx.array, ...]]:
        """One token a row, as a pure function of the remembered rows.

        Args:
            x: ``(B, 1, 1, D)``.
            rows: the W - 1 latest gated inputs ``(B, 1, 1, D)``, oldest first.

        Returns:
            The output ``(B, 1, 1, D)`` and the rows to remember.
        """
        gate_in, gate_out, value = equal_parts(self.in_proj(x), 3)
        gated = gate_in * value
        return self.out_proj(self._convolve(gate_out, [*rows, gated])), (*rows[1:], gated)

    def _convolve(self, gate: mx.array, windows: Sequence[mx.array]) -> mx.array:
        if is_compiling() or gate.shape[0] > 1 or gate.shape[1] <= BLOCK_TOKENS:
            return self._gated_conv(gate, *windows)
        return in_blocks(self._gated_conv, BLOCK_TOKENS, gate[0], *(window[0] for window in windows))[None]

    def _gated_conv(self, gate: mx.array, *windows: mx.array) -> mx.array:
        # Elementwise rather than conv1d: it fuses with the gate, and one kernel serves prefill and decode.
        return gated_conv(gate, windows, self.taps, self.bias if "bias" in self else None)
