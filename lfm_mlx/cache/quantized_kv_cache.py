"""Keys and values in 8 or 4 bits: half or a quarter of the memory, attended to without being unpacked as a whole."""

from __future__ import annotations

import mlx.core as mx

from lfm_mlx.cache.attention_cache import AttentionCache
from lfm_mlx.cache.span import Span
from lfm_mlx.errors import OptionError
from lfm_mlx.kernels import attend_in_chunks, attend_on_cpu, is_for_cpu

KV_BITS = (4, 8)
"""Bits a key or value may be stored in."""

UNPACK_FROM_ROWS = 32
"""From this many query rows a key-value head, a chunk is unpacked once for all of them; below, it is read packed."""

Packed = tuple[mx.array, mx.array, mx.array]
"""Codes ``(B, G, capacity, P * bits / 32)`` uint32; scales and biases ``(B, G, capacity, P / group)`` float32."""


class QuantizedKVCache(AttentionCache):
    """Keys and values quantised in affine groups along P.

    Scales and biases are float32: they cost an eighth of the codes at 8 bits and add no rounding of their own.

    Args:
        keys: packed keys.
        values: packed values.
        bits: 8 or 4.
        group_size: values that share a scale and a bias.
    """

    def __init__(self, keys: Packed, values: Packed, bits: int, group_size: int) -> None:
        super().__init__((*keys, *values))
        self.bits = bits
        self.group_size = group_size

    @classmethod
    def empty(cls, batch_size: int, num_kv_heads: int, head_dim: int, bits: int) -> QuantizedKVCache:
        """A cache without capacity; the first write allocates.

        Raises:
            OptionError: other bits than 8 or 4, or a head width that no group size divides.
        """
        group_size = kv_group_size(head_dim, bits)
        outer = (batch_size, num_kv_heads, 0)
        codes = mx.zeros((*outer, head_dim * bits // 32), dtype=mx.uint32)
        scales = mx.zeros((*outer, head_dim // group_size), dtype=mx.float32)
        return cls((codes, scales, scales), (codes, scales, scales), bits, group_size)

    @property
    def keys(self) -> Packed:
        """Packed keys."""
        return self.arrays[0], self.arrays[1], self.arrays[2]

    @property
    def values(self) -> Packed:
        """Packed values."""
        return self.arrays[3], self.arrays[4], self.arrays[5]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, span: Span, scale: float) -> mx.array:
        """As `AttentionCache.attend`; in float32, a bounded chunk of columns at a time."""
        self.write(keys, values, span)
        if is_for_cpu(queries, span):
            return attend_on_cpu(queries, keys.shape[1], self._columns, span, scale)
        return attend_in_chunks(
            queries,
            keys.shape[1],
            lambda rows, start, stop: self._multiply(rows, self.keys, start, stop, transpose=True),
            lambda weights, start, stop: self._multiply(weights, self.values, start, stop, transpose=False),
            span,
            scale,
        )

    def write(self, keys: mx.array, values: mx.array, span: Span) -> None:
        """Quantise and store keys and values ``(B, G, L, P)`` at the span's positions."""
        packed = [mx.quantize(new.astype(mx.float32), self.group_size, self.bits) for new in (keys, values)]
        self.write_columns([array for parts in packed for array in parts], span)

    def _columns(self, row: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
        return self._unpacked(self.keys, row, start, stop), self._unpacked(self.values, row, start, stop)

    def _unpacked(self, packed: Packed, row: int, start: int, stop: int) -> mx.array:
        codes, scales, biases = (array[row, :, start:stop] for array in packed)
        return mx.dequantize(codes, scales, biases, self.group_size, self.bits)

    def _multiply(self, x: mx.array, packed: Packed, start: int, stop: int, *, transpose: bool) -> mx.array:
        codes, scales, biases = (array[:, :, start:stop] for array in packed)
        if x.shape[2] >= UNPACK_FROM_ROWS:
            columns = mx.dequantize(codes, scales, biases, self.group_size, self.bits)
            return x @ (columns.swapaxes(-1, -2) if transpose else columns)
        return mx.quantized_matmul(
            x, codes, scales, biases, transpose=transpose, group_size=self.group_size, bits=self.bits
        )


def kv_group_size(head_dim: int, bits: int) -> int:
    """Values that share a scale in a quantised cache.

    Raises:
        OptionError: other bits than 8 or 4, or a head width that no group size divides.
    """
    if bits not in KV_BITS:
        raise OptionError(f"kv_bits is {bits!r}, expected one of {', '.join(map(str, KV_BITS))}")
    for size in (64, 32):
        if head_dim % size == 0:
            return size
    raise OptionError(
        f"kv_bits is {bits}, but this model's head width {head_dim} is no multiple of 32; leave kv_bits out"
    )
