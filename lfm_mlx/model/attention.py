"""Grouped-query attention with normalised queries and keys (transformers ``Lfm2Attention``)."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from lfm_mlx.cache import AttentionCache, Span
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
        self._qk_norm_step = qk_norm[:, None]
        mx.eval(self._qk_norm_step)
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
        """Queries ``(B, H, L, P)``, keys and values ``(B, G, L, P)`` of `x` ``(B, L, D)``, rotated by the positions."""
        B, L, _ = x.shape
        H, G, P = self.num_heads, self.num_kv_heads, self.head_dim
        heads = self.qkv_proj(x).reshape(B, L, H + 2 * G, P)
        # Values are normalised too and dropped: the norm then reads whole rows and needs no copy of a slice.
        normed = mx.fast.rms_norm(heads, None, self.eps)
        queries_keys = (normed[:, :, : H + G] * self.qk_norm).transpose(0, 2, 1, 3)  # (B, H + G, L, P)
        rotated = self._rotate(queries_keys, offsets)
        return rotated[:, :H], rotated[:, H:], heads[:, :, H + G :].transpose(0, 2, 1, 3)

    def project_one(self, x: mx.array, offsets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """`project` of one token a row, ``(B, 1, 1, D)``: the same values in half as many array operations."""
        H, G, P = self.num_heads, self.num_kv_heads, self.head_dim
        heads = self.qkv_proj(x).reshape(-1, H + 2 * G, 1, P)
        normed = mx.fast.rms_norm(heads, None, self.eps)
        rotated = self._rotate(normed[:, : H + G] * self._qk_norm_step, offsets)
        return rotated[:, :H], rotated[:, H:], heads[:, H + G :]

    def _rotate(self, heads: mx.array, offsets: mx.array) -> mx.array:
        return mx.fast.rope(heads, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offsets)

    def merge(self, attended: mx.array) -> mx.array:
        """Bring heads ``(B, H, L, P)`` together and project: ``(B, L, D)``."""
        B, H, L, P = attended.shape
        return self.out_proj(attended.transpose(0, 2, 1, 3).reshape(B, L, H * P))

    def merge_one(self, attended: mx.array) -> mx.array:
        """`merge` of one token a row: ``(B, H, 1, P)`` to ``(B, 1, 1, D)``."""
        return self.out_proj(attended.reshape(-1, 1, 1, self.num_heads * self.head_dim))
