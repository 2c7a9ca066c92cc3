"""Affine quantisation with searched scale and bias: the format of `mx.quantize`, closer to the weights.

`mx.quantize` takes scale and bias from a group's minimum and maximum, so that one outlier widens the steps of all. Here
several narrower ranges are tried; for each, values are rounded, scale and bias are fitted to the rounded values by
weighted least squares, rounded to the type they are stored in, and the error that remains is measured. The best attempt
is stored, and it is never worse than the first one, which is the whole range.
"""

from __future__ import annotations

import mlx.core as mx

RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
"""Shares of a group's range from minimum to maximum that are tried."""

_NARROW_RANGES = (0.52, 0.4, 0.3)
"""Tried too where there are few levels, which outliers then spread too far."""


def search_affine(
    rows: mx.array, group_size: int, bits: int, importance: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantise with least (weighted) squared error.

    Args:
        rows: (..., in), any float type; `in` divides into groups.
        group_size: values that share scale and bias.
        bits: 2, 3, 4, 5, 6 or 8.
        importance: float32 (in,) or (rows, in), the weight of each column's squared error; None weighs all alike.

    Returns:
        Packed values uint32, scales and biases in the type of `rows`, as `mx.quantize` returns them.
    """
    *outer, width = rows.shape
    groups = rows.astype(mx.float32).reshape(-1, width // group_size, group_size)
    weights = None
    if importance is not None:
        weights = importance.reshape(-1, width // group_size, group_size)
        mean = weights.mean(axis=-1, keepdims=True)
        weights = mx.where(mean > 0, weights / mx.maximum(mean, 1e-30), 1.0)
    best = _from_mlx(groups, bits, rows.dtype, weights)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    for share in RANGES if bits > 3 else RANGES + _NARROW_RANGES:
        best = _better(best, _attempt(groups, low, high, share, bits, rows.dtype, weights))
        mx.eval(best)
    _, scale, bias = best
    packed = _pack(_levels(groups, scale, bias, bits), bits, (*outer, width))
    shape = (*outer, width // group_size)
    return packed, scale.astype(rows.dtype).reshape(shape), bias.astype(rows.dtype).reshape(shape)


_Fit = tuple[mx.array, mx.array, mx.array]
"""Error, scale and bias of each group, float32 (rows, groups, 1)."""


def _from_mlx(groups: mx.array, bits: int, dtype: mx.Dtype, weights: mx.array | None) -> _Fit:
    """MLX's own scale and bias, so that the result is at least as good."""
    group_size = groups.shape[-1]
    flat = groups.astype(dtype).reshape(groups.shape[0], -1)
    _, scales, biases = mx.quantize(flat, group_size=group_size, bits=bits)
    scale, bias = (array.astype(mx.float32)[..., None] for array in (scales, biases))
    return _error(groups, scale, bias, bits, weights), scale, bias


def _attempt(
    groups: mx.array, low: mx.array, high: mx.array, share: float, bits: int, dtype: mx.Dtype, weights: mx.array | None
) -> _Fit:
    top = 2**bits - 1
    scale = mx.maximum((high - low) * (share / top), 1e-30)
    bias = (high + low) / 2 - scale * (top / 2)
    for _ in range(2):
        scale, bias = _fitted(groups, _levels(groups, scale, bias, bits), scale, bias, weights)
    scale, bias = (array.astype(dtype).astype(mx.float32) for array in (scale, bias))
    return _error(groups, scale, bias, bits, weights), scale, bias


def _fitted(
    groups: mx.array, levels: mx.array, scale: mx.array, bias: mx.array, weights: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The scale and bias that reproduce `groups` best from `levels`; unchanged where all levels are equal."""

    def mean(array: mx.array) -> mx.array:
        return (array if weights is None else array * weights).mean(axis=-1, keepdims=True)

    level, value = mean(levels), mean(groups)
    spread = mean(levels * levels) - level * level
    common = mean(levels * groups) - level * value
    is_fit = (spread > 1e-6) & (common > 0)
    new = mx.where(is_fit, common / mx.maximum(spread, 1e-6), scale)
    return new, mx.where(is_fit, value - new * level, bias)


def _levels(groups: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    inverse = mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))
    return mx.clip(mx.round((groups - bias) * inverse), 0, 2**bits - 1)


def _error(groups: mx.array, scale: mx.array, bias: mx.array, bits: int, weights: mx.array | None) -> mx.array:
    away = mx.square(groups - (_levels(groups, scale, bias, bits) * scale + bias))
    return (away if weights is None else away * weights).sum(axis=-1, keepdims=True)


def _better(first: _Fit, second: _Fit) -> _Fit:
    is_first = first[0] <= second[0]
    error, scale, bias = (mx.where(is_first, a, b) for a, b in zip(first, second, strict=True))
    return error, scale, bias


def _pack(levels: mx.array, bits: int, shape: tuple[int, ...]) -> mx.array:
    """Levels as a little-endian stream of bits in uint32 words, MLX's layout for every number of bits."""
    *outer, width = shape
    values = levels.astype(mx.uint32).reshape(*outer, width // 32, 32, 1)
    if 32 % bits == 0:
        per_word = 32 // bits
        shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
        return (values.reshape(*outer, width // per_word, per_word) << shifts).sum(axis=-1).astype(mx.uint32)
    streams = (values >> mx.arange(bits, dtype=mx.uint32)) & 1  # (..., 32, bits)
    words = streams.reshape(*outer, width // 32, bits, 32) << mx.arange(32, dtype=mx.uint32)
    return words.sum(axis=-1).astype(mx.uint32).reshape(*outer, width * bits // 32)
