"""Grouped-query attention with normalised queries and keys (transformers ``Lfm2Attention``)."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.cache import AttentionCache, Span
from lfm_mlx.kernels import qk_norm_rope
from lfm_mlx.model.linear import AnyLinear


class Attention(Module):
    """H query heads share G key-value heads of width P; q and k are normalised a head, then rotated.

    Args:
        qkv_proj: ``((H + 2 G) P, D)``: queries, keys, values.
        qk_norm: ``(H + G, P)``: the query norm's weight for the H query heads, then the key norm's for the G.
        out_proj: ``(D, H P)``.
        num_heads: H.
        num_kv_heads: G.
        head_dim: P.
        rope_theta: base of the rotary angles (Su et al., arXiv:2104.09864; rotate-half form).
        eps: of the norms.
    """

    def __init__(
        self,
        *,
        qkv_proj: AnyLinear,
        qk_norm: mx.array,
        out_proj: AnyLinear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_theta: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.qkv_proj = qkv_proj
        self.qk_norm = qk_norm
        self.out_proj = out_proj
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.eps = eps
        self.scale = head_dim**-0.5

    def __call__(self, x: mx.array, cache: AttentionCache | None, span: Span) -> mx.array:
        """Map ``(B, L, D)`` to ``(B, L, D)``; the cache, if any, takes the new keys and values."""
        queries, keys, values = self.project(x, span.offsets)
        if cache is not None:
            return self.merge(cache.attend(queries, keys, values, span, self.scale))
        return self.merge(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=span.mask))

    def project(self, x: mx.array, offsets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Project, normalise and rotate.

        Args:
            x: ``(B, L, D)``, or one token a row as ``(B, 1, 1, D)``.
            offsets: int32, position of the first token: a scalar, or ``(B,)``.

        Returns:
            Queries ``(B, H, L, P)``, keys and values ``(B, G, L, P)``.
        """
        return qk_norm_rope(self.qkv_proj(x), self.qk_norm, offsets, self.rope_theta, self.eps)

    def merge(self, attended: mx.array) -> mx.array:
        """Bring heads ``(B, H, L, P)`` together and project: ``(B, L, D)``."""
        B, H, L, P = attended.shape
        return self.out_proj(attended.transpose(0, 2, 1, 3).reshape(B, L, H * P))

    def merge_one(self, attended: mx.array) -> mx.array:
        """`merge` of one token a row: ``(B, H, 1, P)`` to ``(B, 1, 1, D)``."""
        return self.out_proj(attended.reshape(-1, 1, 1, self.num_heads * self.head_dim))
