"""Root-mean-square normalisation."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module


class Norm(Module):
    """``x / sqrt(mean(x²) + eps) * weight``, statistics in float32 (Zhang & Sennrich, arXiv:1910.07467)."""

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise the last axis."""
        return mx.fast.rms_norm(x, self.weight, self.eps)
