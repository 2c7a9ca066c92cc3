"""Proves that a converted folder loads before anyone is told that it exists."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lfm_mlx.checkpoint import Checkpoint, TensorInfo, read_header
from lfm_mlx.errors import CheckpointError

from .write import INDEX, PlannedTensor


def verify(folder: Path | str, planned: Iterable[PlannedTensor] | None = None) -> Checkpoint:
    """Open a converted folder and check config.json, index, file lengths and every tensor's name, type and shape.

    Args:
        folder: the converted checkpoint.
        planned: the tensors it has to hold, neither more nor fewer; None checks against config.json alone.

    Returns:
        The opened checkpoint; no weight has been read.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, extra or different.
        ConfigError: config.json holds a value that cannot be used.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    stored: dict[str, TensorInfo] = {}
    for file in checkpoint.files:
        stored |= read_header(file)
    _check_lengths(checkpoint.files, stored)
    _check_index(folder, stored)
    if planned is not None:
        _check_planned(folder, stored, planned)
    return checkpoint


def _check_lengths(files: Iterable[Path], stored: dict[str, TensorInfo]) -> None:
    """Files are exactly as long as their tensors; that none is shorter was checked when the header was read."""
    for file in files:
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        expected = header + sum(info.num_bytes for info in stored.values() if info.file == file)
        if file.stat().st_size != expected:
            raise CheckpointError(
                f"{file}: {file.stat().st_size:,} bytes, expected {expected:,}; convert the checkpoint again"
            )


def _check_index(folder: Path, stored: dict[str, TensorInfo]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found = {name: info.file.name for name, info in stored.items()}
    for name in sorted(found.keys() | weight_map.keys()):
        if found.get(name) != weight_map.get(name):
            raise CheckpointError(
                f"{index}: places {name} in {weight_map.get(name, 'no file')}, "
                f"but it is in {found.get(name, 'no file')}; convert the checkpoint again"
            )


def _check_planned(folder: Path, stored: dict[str, TensorInfo], planned: Iterable[PlannedTensor]) -> None:
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned}
    found = {name: (info.dtype, info.shape) for name, info in stored.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{folder}: {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}; "
                "convert the checkpoint again"
            )
