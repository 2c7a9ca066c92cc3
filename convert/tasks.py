"""The work of a conversion, cut into tasks that any process can do in any order with the same result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm_mlx.config import Quantization
from lfm_mlx.names import is_matrix

from .segments import Parts, Segment, WeightSource
from .write import Shard, header_bytes, plan_tensors

PIECE_BYTES = 8 << 20
"""Most bytes of the source that are in memory at once, in each process."""

TASK_BYTES = 64 << 20
"""Bytes of the source in one task: what is done again at most after an interruption."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes of an output file: where the result of some rows goes."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of one of our tensors: where they are, what becomes of them, where they go.

    Args:
        name: our tensor.
        width: values in a row.
        reads: the rows in the source.
        stored: how the source has quantised them; None when it has not.
        how: how they are written; None unquantised.
        dtype: what values, or affine scales and biases, are cast to, as safetensors spells it.
        search: whether scale and bias are searched for least squared error instead of taken from minimum and maximum.
        importance: float32 weights of the columns in that error, one row; in a `Treatment` one for all experts or one
            for each.
        writes: one extent for each tensor written.
    """

    name: str
    width: int
    reads: Parts
    stored: Quantization | None
    how: Quantization | None
    dtype: str
    search: bool
    importance: Segment | None
    writes: tuple[Extent, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(segment.num_bytes for segment in self.reads)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pieces that one process does in one go; all begin in `file`."""

    number: int
    file: Path
    pieces: tuple[Piece, ...]

    @property
    def files(self) -> set[Path]:
        """All files that are read: a quantised source may have scales in another one than packed values."""
        return {read.file for piece in self.pieces for read in piece.reads}

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(piece.source_bytes for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What becomes of one of our tensors; the fields are those of `Piece`."""

    how: Quantization | None
    dtype: str
    search: bool = False
    importance: Segment | None = None


def row_piece(name: str, width: int, reads: Parts, stored: Quantization | None, dtype: str) -> Piece:
    """Rows that are only looked at: nothing of them is written."""
    return Piece(
        name=name,
        width=width,
        reads=reads,
        stored=stored,
        how=None,
        dtype=dtype,
        search=False,
        importance=None,
        writes=(),
    )


def plan_tasks(
    source: WeightSource,
    treatments: Mapping[str, Treatment],
    shards: Iterable[Shard],
    *,
    piece_bytes: int = PIECE_BYTES,
    task_bytes: int = TASK_BYTES,
) -> tuple[Task, ...]:
    """Cut a conversion into tasks, in the order in which the source's files hold the bytes.

    Args:
        source: the checkpoint.
        treatments: by our name, what becomes of each tensor.
        shards: the output files, complete: each written tensor has its place there.
        piece_bytes: most bytes of rows read at once; a single row may be larger.
        task_bytes: bytes of rows in a task; its last piece may exceed it.
    """
    places = _places(shards)
    order = {file: i for i, file in enumerate(source.files)}
    pieces = [
        piece
        for name, treatment in treatments.items()
        for piece in _pieces(source, name, treatment, places, piece_bytes)
    ]
    pieces.sort(key=lambda piece: (order[piece.reads[0].file], piece.reads[0].offset))
    return tuple(_grouped(pieces, task_bytes))


def _grouped(pieces: Iterable[Piece], task_bytes: int) -> Iterator[Task]:
    number, waiting, waiting_bytes = 0, list[Piece](), 0
    for piece in pieces:
        if waiting and (waiting_bytes >= task_bytes or waiting[0].reads[0].file != piece.reads[0].file):
            yield Task(number=number, file=waiting[0].reads[0].file, pieces=tuple(waiting))
            number, waiting, waiting_bytes = number + 1, [], 0
        waiting.append(piece)
        waiting_bytes += piece.source_bytes
    if waiting:
        yield Task(number=number, file=waiting[0].reads[0].file, pieces=tuple(waiting))


def _places(shards: Iterable[Shard]) -> dict[str, Extent]:
    places = {}
    for shard in shards:
        offset = len(header_bytes(shard.tensors))
        for tensor in shard.tensors:
            places[tensor.name] = Extent(file=shard.file, offset=offset, num_bytes=tensor.num_bytes)
            offset += tensor.num_bytes
    return places


def _pieces(
    source: WeightSource, name: str, treatment: Treatment, places: Mapping[str, Extent], piece_bytes: int
) -> Iterator[Piece]:
    shape = source.tensors[name]
    all_rows = list(source.segments(name))
    total = sum(parts[0].num_rows for parts in all_rows)
    targets = [places[t.name] for t in plan_tensors(name, shape, treatment.dtype, treatment.how)]
    matrix_rows = shape[-2] if is_matrix(name) else 1
    done = 0
    for parts in all_rows:
        row_bytes = sum(segment.row_bytes for segment in parts)
        for first, count in _steps(parts[0].num_rows, max(1, piece_bytes // row_bytes), matrix_rows):
            yield Piece(
                name=name,
                width=shape[-1] if is_matrix(name) else math.prod(shape),
                reads=tuple(segment.part(first, count) for segment in parts),
                stored=source.stored_as(name),
                how=treatment.how,
                dtype=treatment.dtype,
                search=treatment.search,
                importance=_importance(treatment.importance, (done + first) // matrix_rows),
                writes=tuple(_slice(target, done + first, count, total) for target in targets),
            )
        done += parts[0].num_rows


def _steps(num_rows: int, step: int, matrix_rows: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each piece; none reaches from one expert's matrix into the next."""
    for matrix in range(0, num_rows, matrix_rows):
        end = min(matrix + matrix_rows, num_rows)
        for first in range(matrix, end, step):
            yield first, min(step, end - first)


def _slice(target: Extent, first: int, count: int, total: int) -> Extent:
    row_bytes = target.num_bytes // total
    return Extent(file=target.file, offset=target.offset + first * row_bytes, num_bytes=count * row_bytes)


def _importance(importance: Segment | None, matrix: int) -> Segment | None:
    if importance is None:
        return None
    return importance.part(matrix if importance.num_rows > 1 else 0, 1)
