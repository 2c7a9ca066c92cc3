"""Parts of a stored tensor, read without the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SCRATCH_BYTES = 4 << 20
"""Read at once where what is wanted and what is not lie close together."""

STRETCH_BYTES = 64 << 10
"""Stretches of at least so many bytes are read by themselves."""

_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}
"""As what numpy reads the dtypes of safetensors."""


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
    import numpy as np  # takes a tenth of a second, and few programs need it

    stored = np.dtype(_STORED[dtype])
    inner = math.prod(shape[axis + 1 :]) * stored.itemsize
    outer = math.prod(shape[:axis])
    spans = [(places.start * inner, places.stop * inner) for places in ranges]
    found = np.empty((outer, sum(stop - start for start, stop in spans)), dtype=np.uint8)
    with file.open("rb", buffering=0) as stream:
        if min(stop - start for start, stop in spans) >= STRETCH_BYTES:
            _read_stretches(stream, offset, shape[axis] * inner, spans, found)
        else:
            _read_blocks(stream, offset, shape[axis] * inner, spans, found)
    array = mx.array(found.view(stored).reshape(*shape[:axis], -1, *shape[axis + 1 :]))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def _read_stretches(
    stream: FileIO, offset: int, row_bytes: int, spans: Sequence[tuple[int, int]], found: npt.NDArray[np.uint8]
) -> None:
    for i, row in enumerate(found):
        at = 0
        for start, stop in spans:
            _read_into(stream, offset + i * row_bytes + start, row[at : at + stop - start])
            at += stop - start


def _read_blocks(
    stream: FileIO, offset: int, row_bytes: int, spans: Sequence[tuple[int, int]], found: npt.NDArray[np.uint8]
) -> None:
    num_rows = max(SCRATCH_BYTES // row_bytes, 1)
    scratch = found[:0].copy()
    scratch.resize((min(num_rows, len(found)), row_bytes))
    for first in range(0, len(found), num_rows):
        rows = found[first : first + num_rows]
        block = scratch[: len(rows)]
        _read_into(stream, offset + first * row_bytes, block.reshape(-1))
        at = 0
        for start, stop in spans:
            rows[:, at : at + stop - start] = block[:, start:stop]
            at += stop - start


def _read_into(stream: FileIO, offset: int, wanted: npt.NDArray[np.uint8]) -> None:
    stream.seek(offset)
    view = memoryview(wanted)  # type: ignore[arg-type]  # numpy 1 has no annotation for it
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise OSError(f"ends {len(view):,} bytes too early")
        view = view[count:]
