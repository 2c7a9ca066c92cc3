"""Where the rows of a tensor lie: which bytes of which file, whatever the checkpoint's layout.

Quantisation works on each row alone, so rows are the unit in which weights are read, converted and written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lfm_mlx.checkpoint import Checkpoint, Source, TensorInfo
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.names import Shape, expected_tensors, is_matrix


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of one stored tensor.

    Args:
        file: where they are.
        offset: bytes before the first row.
        num_rows: how many.
        row_bytes: bytes of each.
        dtype: safetensors' name of their type, or GGUF's.
    """

    file: Path
    offset: int
    num_rows: int
    row_bytes: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.row_bytes

    def part(self, first_row: int, num_rows: int) -> Segment:
        """Some of the rows."""
        return replace(self, offset=self.offset + first_row * self.row_bytes, num_rows=num_rows)


Parts = tuple[Segment, ...]
"""The same rows in each tensor that stores them: one, or packed weight, scales and perhaps biases."""


class WeightSource(Protocol):
    """A checkpoint, seen as rows of our tensors."""

    config: ModelConfig
    files: tuple[Path, ...]

    @property
    def tensors(self) -> dict[str, Shape]:
        """Our tensors with their unquantised shapes, in the order of the forward pass."""
        ...

    def dtype(self, name: str) -> str:
        """The type in which the values of our tensor are stored: BF16, F16 or F32; a GGUF file's blocks give F32."""
        ...

    def stored_as(self, name: str) -> Quantization | None:
        """How our tensor is quantised in the source in one of MLX's formats; None when it is not."""
        ...

    def segments(self, name: str) -> Iterator[Parts]:
        """All rows of our tensor in order; what is no matrix is one row."""
        ...


class CheckpointSource:
    """A folder of safetensors files as a `WeightSource`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.files = checkpoint.files

    @property
    def tensors(self) -> dict[str, Shape]:
        """Our tensors with their unquantised shapes, in the order of the forward pass."""
        shapes = expected_tensors(self.config)
        return {name: shape for name, shape in shapes.items() if self.checkpoint.has(name)}

    def dtype(self, name: str) -> str:
        """The type of the values, of the scales where they are quantised."""
        path = name.removesuffix(".weight")
        stored = f"{path}.scales" if self.stored_as(name) is not None else name
        dtype = self.checkpoint.sources(stored)[0].info.dtype
        return "BF16" if dtype == "U8" else dtype

    def stored_as(self, name: str) -> Quantization | None:
        """How our tensor is quantised."""
        return self.checkpoint.quantization_of(name) if is_matrix(name) else None

    def segments(self, name: str) -> Iterator[Parts]:
        """All rows of our tensor in order."""
        stored = self.stored_as(name)
        if stored is not None:
            path = name.removesuffix(".weight")
            kinds = ("weight", "scales", "biases") if stored.mode == "affine" else ("weight", "scales")
            yield tuple(_rows(self.checkpoint.sources(f"{path}.{kind}")[0].info) for kind in kinds)
            return
        for source in self.checkpoint.sources(name):
            for segment in _plain(name, source):
                yield (segment,)


def _plain(name: str, source: Source) -> Iterator[Segment]:
    info = source.info
    if not is_matrix(name):
        yield Segment(file=info.file, offset=info.offset, num_rows=1, row_bytes=info.num_bytes, dtype=info.dtype)
        return
    rows = _rows(info)
    if source.part.rows is None:
        yield rows
        return
    num_experts, both = info.shape[:2]
    half = both // 2
    for expert in range(num_experts):
        yield rows.part(expert * both + source.part.rows * half, half)


def _rows(info: TensorInfo) -> Segment:
    count = math.prod(info.shape[:-1])
    return Segment(
        file=info.file, offset=info.offset, num_rows=count, row_bytes=info.num_bytes // count, dtype=info.dtype
    )
