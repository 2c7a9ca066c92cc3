"""Weights on disk: safetensors shards and their index.

A shard's header is known before its first byte of data, so each part of the data can be put in its place at any time.
Layout of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_mlx.config import Quantization
from lfm_mlx.names import Shape

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` is spelled as safetensors does."""

    name: str
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_tensors(name: str, shape: Shape, dtype: str, how: Quantization | None) -> list[PlannedTensor]:
    """The tensors written for one of ours.

    Args:
        name: our name.
        shape: its unquantised shape.
        dtype: of unquantised values and of affine scales and biases.
        how: how it is quantised; None leaves it as it is.
    """
    if how is None:
        return [PlannedTensor(name=name, dtype=dtype, shape=shape)]
    path = name.removesuffix(".weight")
    *outer, width = shape
    groups = (*outer, width // how.group_size)
    planned = [PlannedTensor(name=name, dtype="U32", shape=(*outer, width * how.bits // 32))]
    if how.mode != "affine":
        return [*planned, PlannedTensor(name=f"{path}.scales", dtype="U8", shape=groups)]
    return planned + [PlannedTensor(name=f"{path}.{kind}", dtype=dtype, shape=groups) for kind in ("scales", "biases")]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of weights and the tensors in it, in the order of their bytes."""

    file: str
    tensors: tuple[PlannedTensor, ...]


def plan_shards(tensors: Iterable[PlannedTensor], shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors over files of at most `shard_bytes` of data; a larger tensor gets a file of its own."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    count = len(groups)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    return tuple(Shard(file=file, tensors=tuple(group)) for file, group in zip(files, groups, strict=True))


def allocate(folder: Path, shards: Iterable[Shard]) -> None:
    """Make every shard with its header and its full length; an existing one keeps its data."""
    for shard in shards:
        header = header_bytes(shard.tensors)
        descriptor = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, header, 0)
            os.ftruncate(descriptor, len(header) + sum(tensor.num_bytes for tensor in shard.tensors))
        finally:
            os.close(descriptor)


def header_bytes(tensors: Iterable[PlannedTensor]) -> bytes:
    """The start of a safetensors file: length and JSON header, padded so that the data starts at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_index(folder: Path, shards: Iterable[Shard], num_parameters: int) -> None:
    """Write the index: which file holds which tensor, and the sum of their bytes."""
    placed = {tensor.name: (shard.file, tensor.num_bytes) for shard in shards for tensor in shard.tensors}
    total = sum(num_bytes for _, num_bytes in placed.values())
    index = {
        "metadata": {"total_size": total, "total_parameters": num_parameters},
        "weight_map": {name: placed[name][0] for name in sorted(placed)},
    }
    write_json(folder / INDEX, index)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write `value` indented by four, as mlx-lm does, and wait until it is on the disk."""
    with file.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=4)
        stream.flush()
        os.fsync(stream.fileno())
