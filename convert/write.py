"""Weights on disk: safetensors shards that are appended to tensor by tensor, and their index.

A shard's header is known before its first byte of data, so no more than one tensor has to be in memory. Layout of the
format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from lfm_mlx.names import Shape

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

_CODES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` is spelled as safetensors does."""

    name: str
    dtype: str
    shape: Shape
    num_bytes: int

    @classmethod
    def of(cls, name: str, array: mx.array) -> PlannedTensor:
        """The plan for `array`, which need not be evaluated."""
        return cls(name=name, dtype=_CODES[array.dtype], shape=tuple(array.shape), num_bytes=array.nbytes)


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


def write_shards(folder: Path, shards: Iterable[Shard], arrays: Iterator[tuple[str, mx.array]]) -> None:
    """Write every shard, taking one array after the other; `arrays` yields them in the planned order."""
    for shard in shards:
        with (folder / shard.file).open("wb") as stream:
            stream.write(header_bytes(shard.tensors))
            for tensor in shard.tensors:
                _append(stream, tensor, arrays)
            stream.flush()
            os.fsync(stream.fileno())
    assert next(arrays, None) is None


def _append(stream: BinaryIO, tensor: PlannedTensor, arrays: Iterator[tuple[str, mx.array]]) -> None:
    name, array = next(arrays)
    assert PlannedTensor.of(name, array) == tensor
    data = mx.contiguous(array).reshape(-1).view(mx.uint8)
    stream.write(memoryview(data))  # type: ignore[arg-type]  # mlx's stubs leave out the buffer protocol


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
