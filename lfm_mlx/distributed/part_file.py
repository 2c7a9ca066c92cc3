"""Parts of a stored tensor, read without the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import mlx.core as mx

SCRATCH_BYTES = 4 << 20
"""Read at once where what is wanted and what is not lie close together."""

STRETCH_BYTES = 64 << 10
"""Stretches of at least so many bytes are read by themselves."""

_STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
"""The dtypes of safetensors."""


def read_ranges(
    file: Path, offset: int, shape: Sequence[int], dtype: str, axis: int, ranges: Sequence[range]
) -> mx.array:
    """Places of a stored tensor along one axis, side by side.

    Args:
        file: holds the tensor's values, the last axis running fastest.
        offset: where they begin.
        shape: of the tensor.
        dtype: as safetensors calls it: F32, F16, BF16, U32 or U8.
        axis: the axis, counted from 0.
        ranges: places along it.

    Raises:
        OSError: the file cannot be read, or is too short.
    """
    stored = _STORED[dtype]
    inner = math.prod(shape[axis + 1 :]) * stored.size
    outer = math.prod(shape[:axis])
    spans = [(places.start * inner, places.stop * inner) for places in ranges]
    found = _new_bytes(outer, sum(stop - start for start, stop in spans))
    wanted = _bytes_of(found)
    with file.open("rb", buffering=0) as stream:
        if min(stop - start for start, stop in spans) >= STRETCH_BYTES:
            _read_stretches(stream, offset, shape[axis] * inner, spans, wanted)
        else:
            _read_blocks(stream, offset, shape[axis] * inner, spans, wanted)
    return found.view(stored).reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _new_bytes(num_rows: int, row_bytes: int) -> mx.array:
    """An array to read a file into: a copy of it would be held at the same time."""
    array = mx.zeros((num_rows, row_bytes), dtype=mx.uint8)
    mx.eval(array)
    return array


def _bytes_of(array: mx.array) -> memoryview:
    return memoryview(array).cast("B")  # type: ignore[arg-type]  # It has a buffer, which its annotations leave out.


def _read_stretches(
    stream: FileIO, offset: int, row_bytes: int, spans: Sequence[tuple[int, int]], wanted: memoryview
) -> None:
    at = 0
    while at < len(wanted):
        for start, stop in spans:
            _read_into(stream, offset + start, wanted[at : at + stop - start])
            at += stop - start
        offset += row_bytes


def _read_blocks(
    stream: FileIO, offset: int, row_bytes: int, spans: Sequence[tuple[int, int]], wanted: memoryview
) -> None:
    num_rows = max(SCRATCH_BYTES // row_bytes, 1)
    num_left = len(wanted) // sum(stop - start for start, stop in spans)
    at = 0
    while num_left:
        block = _new_bytes(min(num_rows, num_left), row_bytes)
        _read_into(stream, offset, _bytes_of(block))
        parts = mx.contiguous(mx.concatenate([block[:, start:stop] for start, stop in spans], axis=1))
        mx.eval(parts)
        wanted[at : at + parts.nbytes] = _bytes_of(parts)
        at += parts.nbytes
        offset += block.nbytes
        num_left -= len(block)


def _read_into(stream: FileIO, offset: int, wanted: memoryview) -> None:
    stream.seek(offset)
    while len(wanted):
        count = stream.readinto(wanted)
        if not count:
            raise OSError(f"ends {len(wanted):,} bytes too early")
        wanted = wanted[count:]
