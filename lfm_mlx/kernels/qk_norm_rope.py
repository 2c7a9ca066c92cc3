"""The norms of queries and keys and their rotation, straight from the fused q/k/v row, in one launch instead of three.

Queries and keys come out as two arrays, each without gaps, whatever the number of rows: attention copies neither.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from lfm_mlx.kernels.choice import MAX_TOKENS, Case, FusedKernel, are_alike, random_values
from lfm_mlx.kernels.metal_kernel import SIMD_LANES, MetalKernel, constant

MAX_HEADS_IN_GROUP = 8
"""Most heads, a SIMD group each, of a threadgroup."""

SOURCE = """
  constexpr int HALF = P / 2;
  constexpr int PAIRS = (HALF + 31) / 32;
  const int lane = thread_index_in_simdgroup;
  const int head = thread_position_in_grid.y;
  const int token = thread_position_in_grid.z;
  const int num_kv_heads = qkv_shape[qkv_ndim - 1] / P - weight_shape[0];
  const int num_heads = weight_shape[0] - num_kv_heads;
  const int num_tokens = qkv_shape[1];
  const int row = token / num_tokens;
  const int column = token % num_tokens;
  const int start = (token * (num_heads + 2 * num_kv_heads) + head) * P;
  T low[PAIRS];
  T high[PAIRS];
  float squares = 0.0f;
  for (int n = 0; n < PAIRS; n++) {
    const int i = lane + 32 * n;
    if (i < HALF) {
      low[n] = qkv[start + i];
      high[n] = qkv[start + i + HALF];
      squares += float(low[n]) * float(low[n]) + float(high[n]) * float(high[n]);
    }
  }
  const float scale = metal::precise::rsqrt(metal::simd_sum(squares) / P + eps);
  const float position = float(offsets[offsets_shape[0] == 1 ? 0 : row] + column);
  device T* y = head < num_heads ? queries + ((row * num_heads + head) * num_tokens + column) * P
                                 : keys + ((row * num_kv_heads + head - num_heads) * num_tokens + column) * P;
  for (int n = 0; n < PAIRS; n++) {
    const int i = lane + 32 * n;
    if (i < HALF) {
      const float a = float(T(float(low[n]) * scale) * weight[head * P + i]);
      const float b = float(T(float(high[n]) * scale) * weight[head * P + i + HALF]);
      const float angle = position * frequencies[i];
      const float c = metal::precise::cos(angle);
      const float s = metal::precise::sin(angle);
      y[i] = T(a * c - b * s);
      y[i + HALF] = T(b * c + a * s);
    }
  }
"""
"""One SIMD group a head of a token; a lane holds the pairs (i, i + P / 2) that are rotated together."""

KERNEL = MetalKernel(
    "qk_norm_rope",
    inputs=["qkv", "weight", "offsets", "frequencies", "eps"],
    outputs=["queries", "keys"],
    source=SOURCE,
)

Heads = tuple[mx.array, mx.array, mx.array]


def qk_norm_rope(qkv: mx.array, weight: mx.array, offsets: mx.array, theta: float, eps: float) -> Heads:
    """Normalise queries and keys head by head, and rotate them by their positions.

    A head x of P values becomes ``n = x / sqrt(mean(x²) + eps)``, rounded to its dtype, times its weight, rounded
    again; then the pairs (i, i + P / 2) are turned by ``position * theta^(-2 i / P)`` in float32 and rounded once.

    Args:
        qkv: ``(B, L, (H + 2 G) P)`` or ``(B, 1, 1, (H + 2 G) P)``: queries, keys and values of each token.
        weight: ``(H + G, P)``, of the queries' norm and then of the keys'.
        offsets: int32, position of the first token: a scalar, or ``(B,)``.
        theta: base of the angles (Su et al., arXiv:2104.09864; rotate-half form).
        eps: added to the mean square.

    Returns:
        Queries ``(B, H, L, P)``, keys and values ``(B, G, L, P)``.
    """
    queries, keys, values = QK_NORM_ROPE(qkv, weight, offsets, theta, eps)
    return queries, keys, values


def _reference(qkv: mx.array, weight: mx.array, offsets: mx.array, theta: float, eps: float) -> Heads:
    B, L, *_ = qkv.shape
    N, P = weight.shape
    G = qkv.shape[-1] // P - N
    # Values are normalised too and dropped: the norm then reads whole rows and needs no copy of a slice.
    if L == 1:
        heads = qkv.reshape(-1, N + G, 1, P)
        normed = mx.fast.rms_norm(heads, None, eps)
        queries_keys, values = normed[:, :N] * weight[:, None], heads[:, N:]
    else:
        heads = qkv.reshape(B, L, N + G, P)
        normed = mx.fast.rms_norm(heads, None, eps)
        queries_keys = (normed[:, :, :N] * weight).transpose(0, 2, 1, 3)  # (B, H + G, L, P)
        values = heads[:, :, N:].transpose(0, 2, 1, 3)
    rotated = mx.fast.rope(queries_keys, P, traditional=False, base=theta, scale=1.0, offset=offsets)
    return rotated[:, : N - G], rotated[:, N - G :], values


def _exact(qkv: mx.array, weight: mx.array, offsets: mx.array, theta: float, eps: float) -> Heads:
    """The steps of the docstring, one by one: `mx.fast.rope` rounds angles, and in bfloat16 more, on some backends."""
    B, L, *_ = qkv.shape
    N, P = weight.shape
    G = qkv.shape[-1] // P - N
    heads = qkv.reshape(B, L, N + G, P)
    scaled = mx.fast.rms_norm(heads, None, eps)[:, :, :N] * weight
    low, high = mx.split(scaled.transpose(0, 2, 1, 3).astype(mx.float32), 2, axis=-1)
    positions = offsets.reshape(-1, 1, 1, 1) + mx.arange(L)[:, None]
    angles = positions.astype(mx.float32) * frequencies(theta, P)
    cosines, sines = mx.cos(angles), mx.sin(angles)
    rotated = mx.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=-1).astype(qkv.dtype)
    return rotated[:, : N - G], rotated[:, N - G :], heads[:, :, N:].transpose(0, 2, 1, 3)


def _launch(qkv: mx.array, weight: mx.array, offsets: mx.array, theta: float, eps: float) -> Heads:
    B, L, *_ = qkv.shape
    N, P = weight.shape
    G = qkv.shape[-1] // P - N
    queries, keys = KERNEL.launch(
        [qkv, weight, offsets.reshape(-1), frequencies(theta, P), constant(eps)],
        template=[("T", qkv.dtype), ("P", P)],
        grid=(SIMD_LANES, N, B * L),
        threadgroup=(SIMD_LANES, min(N, MAX_HEADS_IN_GROUP), 1),
        output_shapes=[(B, N - G, L, P), (B, G, L, P)],
        output_dtypes=[qkv.dtype] * 2,
    )
    return queries, keys, qkv.reshape(B, L, N + G, P)[:, :, N:].transpose(0, 2, 1, 3)


@functools.cache
def frequencies(theta: float, head_dim: int) -> mx.array:
    """``theta^(-2 i / P)`` for the pairs of a head, float32 ``(P / 2,)``; kept."""
    made = mx.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=mx.float32)
    mx.eval(made)
    return made


def _case(qkv: mx.array, weight: mx.array, offsets: mx.array, theta: float, eps: float) -> Case | None:
    N, P = weight.shape
    G = qkv.shape[-1] // P - N
    is_in_range = P % 2 == 0 and P <= 256 and qkv.size <= (N + G) * P * MAX_TOKENS and are_alike(qkv, weight)
    return Case.of(qkv.dtype, H=N - G, G=G, P=P) if is_in_range and offsets.dtype == mx.int32 else None


def _example(case: Case, num_rows: int, num_tokens: int) -> tuple[mx.array, mx.array, mx.array, float, float]:
    N, G, P = case["H"] + case["G"], case["G"], case["P"]
    qkv = random_values((num_rows, num_tokens, (N + G) * P), case.dtype, 1)
    offsets = mx.array([(37 * row) % 91 for row in range(num_rows)], dtype=mx.int32)
    return qkv, random_values((N, P), case.dtype, 2), offsets, 1e6, 1e-5


QK_NORM_ROPE = FusedKernel(
    name="qk_norm_rope",
    source=SOURCE,
    launch=_launch,
    reference=_reference,
    case_of=_case,
    example=_example,
    exact=_exact,
)
