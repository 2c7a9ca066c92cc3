"""One task done: rows read, cast, quantised and put in their place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from lfm_mlx.errors import CheckpointError

from .gguf_blocks import dequantized_blocks
from .quantize import DTYPES_OF_CODES, check_float16, quantize_rows
from .segments import Segment
from .tasks import Extent, Piece, Task

_WORDS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}


class OrphanedError(Exception):
    """Nobody waits for the result any more."""


def perform(task: Task, folder: Path, is_wanted: Callable[[], bool] = lambda: True) -> str:
    """Do a task; its part of the files in `folder` is complete when this returns.

    Args:
        task: what to do.
        folder: holds the output files, allocated already.
        is_wanted: asked before each piece; when it says no, the task is given up.

    Returns:
        The SHA-256 of all bytes written, in the order of the pieces and their extents.

    Raises:
        OrphanedError: the task is not wanted any more.
        CheckpointError: the source is shorter than it was, or cannot be read.
        ConversionError: a value does not fit the type it is cast to.
        OSError: a result cannot be written.
    """
    digest = hashlib.sha256()
    with Places(folder) as places:
        for piece in task.pieces:
            if not is_wanted():
                raise OrphanedError
            arrays = _converted(piece)
            for extent, array in zip(piece.writes, arrays, strict=True):
                data = memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)).cast("B")  # type: ignore[arg-type]
                assert len(data) == extent.num_bytes
                places.write(extent, data)
                digest.update(data)
            del arrays
            mx.clear_cache()
    return digest.hexdigest()


def digest_of(task: Task, folder: Path) -> str:
    """What `perform` would return if the bytes that lie in `folder` now were its work."""
    digest = hashlib.sha256()
    with Places(folder) as places:
        for piece in task.pieces:
            for extent in piece.writes:
                digest.update(places.read(extent))
    return digest.hexdigest()


class Places:
    """The output files, each opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def write(self, extent: Extent, data: memoryview) -> None:
        """Put `data` in its place."""
        descriptor, done = self._descriptor(extent.file), 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], extent.offset + done)

    def read(self, extent: Extent) -> bytes:
        """The bytes that are there, fewer where the file ends."""
        return os.pread(self._descriptor(extent.file), extent.num_bytes, extent.offset)

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) >= 64:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = os.open(self.folder / file, os.O_RDWR)
        return self._open[file]


def _converted(piece: Piece) -> list[mx.array]:
    """The evaluated arrays to write, one for each extent."""
    values = cast_rows(piece)
    importance = None if piece.importance is None else read_rows(piece.importance).reshape(-1)
    made = [values] if piece.how is None else quantize_rows(values, piece.how, piece.search, importance)
    mx.eval(made)
    return made


def cast_rows(piece: Piece) -> mx.array:
    """The values of a piece's rows (rows, width), in the type they are cast to."""
    first, *rest = (read_rows(segment) for segment in piece.reads)
    if piece.stored is not None:
        scales, *biases = rest
        values = mx.dequantize(
            first,
            scales,
            biases[0] if biases else None,
            group_size=piece.stored.group_size,
            bits=piece.stored.bits,
            mode=piece.stored.mode,
            dtype=None if biases else DTYPES_OF_CODES[piece.dtype],
        )
    else:
        values = first
    values = values.reshape(-1, piece.width)
    if piece.dtype == "F16":
        check_float16(piece.name, values)
    return values.astype(DTYPES_OF_CODES[piece.dtype])


def read_rows(segment: Segment) -> mx.array:
    """The stored rows as (rows, values in a row); a GGUF file's blocks as float32.

    Raises:
        CheckpointError: the file is shorter than it was, or cannot be read.
    """
    data = np.empty(segment.num_bytes, np.uint8)
    try:
        with segment.file.open("rb", buffering=0) as stream:
            stream.seek(segment.offset)
            num_read = 0
            while count := stream.readinto(data[num_read:].data):
                num_read += count
    except OSError as error:
        raise CheckpointError(f"{segment.file}: cannot be read ({error}); fetch the file again") from error
    if num_read < len(data):
        raise CheckpointError(
            f"{segment.file}: ends {len(data) - num_read:,} bytes early, expected {segment.num_bytes:,} bytes from "
            f"{segment.offset:,}; the file was truncated while it was being read, fetch it again"
        )
    if segment.dtype not in _WORDS:
        return mx.array(dequantized_blocks(data.reshape(segment.num_rows, -1), segment.dtype))
    words = mx.array(data.view(_WORDS[segment.dtype]).reshape(segment.num_rows, -1))
    return words.view(DTYPES_OF_CODES[segment.dtype])
