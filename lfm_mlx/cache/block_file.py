"""One block of the prefix cache as a safetensors file: written beside its place and renamed, checked when read.

A file says what it holds: its own key and its parent's, the tokens, and a checksum of all data. There is no fsync: what
a power cut tears is found by the checksum.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from lfm_mlx.cache.prefix_block import Block

SUFFIX = ".safetensors"
_FORMAT = "lfm_mlx prefix block, version 1"
_MAX_HEADER_BYTES = 1 << 20
_NUMPY_OF = {"F32": "float32", "F16": "float16", "BF16": "uint16", "U32": "uint32", "I32": "int32"}
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


Tensors = Mapping[str, tuple[str, tuple[int, ...], memoryview]]
"""By name: dtype in the words of safetensors, shape, data."""


class BlockFileError(Exception):
    """A file is no block, or a damaged one; the message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class BlockHeader:
    """What a file says about itself.

    Args:
        key: of the row's tokens up to the block's end.
        parent: key of the row's tokens in front of the block.
        start: tokens in front of the block.
        tokens: the block's.
        lengths: where it has checkpoints.
    """

    key: str
    parent: str
    start: int
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """A block's tensors as they were read and checked, in whatever thread: copied, and nothing left to compute.

    Args:
        header: of the file.
        values: by name: the array, of a dtype of the same size that NumPy has too, and its own dtype.
    """

    header: BlockHeader
    values: Mapping[str, tuple[mx.array, mx.Dtype]]

    def as_block(self) -> Block:
        """The block; in the thread that will use it, for it queues work on the device."""
        arrays = {
            name: found if found.dtype == dtype else found.view(dtype) for name, (found, dtype) in self.values.items()
        }
        columns = [arrays[f"columns.{i}"] for i in range(sum(name.startswith("columns.") for name in arrays))]
        return Block(columns, {length: arrays[f"checkpoint.{length}"] for length in self.header.lengths})


def block_views(block: Block) -> Tensors:
    """A block's tensors as `write_block` takes them: views that another thread may read.

    Args:
        block: evaluated.
    """
    arrays = {f"columns.{i}": columns for i, columns in enumerate(block.columns)}
    arrays |= {f"checkpoint.{length}": rows for length, rows in sorted(block.checkpoints.items())}
    return {name: (_NAMES[found.dtype], tuple(found.shape), _bytes_of(found)) for name, found in arrays.items()}


def write_block(path: Path, header: BlockHeader, tensors: Tensors) -> int:
    """Write a block's file, whole or not at all.

    Returns:
        Bytes of the file.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    tokens = memoryview(array("i", header.tokens)).cast("B")
    all_tensors = {"tokens": ("I32", (len(header.tokens),), tokens), **tensors}
    checksum = 0
    for _, _, data in all_tensors.values():
        checksum = zlib.crc32(data, checksum)
    facts = {"format": _FORMAT, "key": header.key, "parent": header.parent, "start": str(header.start)}
    parts = [_packed_header(all_tensors, {**facts, "crc32": str(checksum)})]
    parts += [data for _, _, data in all_tensors.values()]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            stream.writelines(parts)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return sum(len(part) for part in parts)


def read_block_header(path: Path) -> BlockHeader:
    """What a file says about itself, its tensors left unread.

    Raises:
        BlockFileError: it is no block, or shorter than it says.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = _header_len(start, size)
        entries, facts = _parsed(stream.read(length), size - 8 - length)
        return _block_header(entries, facts, stream.read(_num_bytes(entries.get("tokens", (("I32", (0,), 0, 0))))))


def read_block(path: Path) -> StoredBlock:
    """A block's tensors, its checksum verified.

    Raises:
        BlockFileError: it is no block, or a damaged one.
        OSError: it cannot be read.
    """
    content = memoryview(path.read_bytes())
    length = _header_len(content[:8], len(content))
    data = content[8 + length :]
    entries, facts = _parsed(bytes(content[8 : 8 + length]), len(data))
    if str(zlib.crc32(data)) != facts.get("crc32"):
        raise BlockFileError("its checksum is not that of its data")
    tensors = {name: (dtype, shape, data[begin:end]) for name, (dtype, shape, begin, end) in entries.items()}
    _, _, tokens = tensors.pop("tokens", ("", (), memoryview(b"")))
    values = {name: _copied(*tensor) for name, tensor in tensors.items()}
    return StoredBlock(header=_block_header(entries, facts, tokens), values=values)


Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor's dtype, shape, and where its data begin and end."""


def _packed_header(tensors: Tensors, facts: Mapping[str, str]) -> memoryview:
    ends = list(itertools.accumulate(len(data) for _, _, data in tensors.values()))
    entries: dict[str, Any] = {"__metadata__": dict(facts)}
    for (name, (dtype, shape, data)), end in zip(tensors.items(), ends, strict=True):
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end - len(data), end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(struct.pack("<Q", len(text)) + text)


def _header_len(start: Sequence[int] | bytes, size: int) -> int:
    length = struct.unpack("<Q", bytes(start))[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise BlockFileError(f"its {size:,} bytes do not start with a safetensors header")
    return int(length)


def _parsed(text: bytes, num_data_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors by name, and the file's facts; every number is checked."""
    try:
        entries = json.loads(text)
        facts = entries.pop("__metadata__")
        tensors = {
            name: (entry["dtype"], tuple(entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in entries.items()
        }
        at = 0
        for entry in tensors.values():
            if entry[2] != at or entry[3] - at != _num_bytes(entry) or any(size < 0 for size in entry[1]):
                raise ValueError("data offsets do not fit the shapes")
            at = entry[3]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BlockFileError(f"its header is damaged ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise BlockFileError(f"it is not in the format {_FORMAT!r}")
    if at != num_data_bytes:
        raise BlockFileError(f"it holds {num_data_bytes:,} bytes of data, expected {at:,}")
    return tensors, facts


def _block_header(entries: Mapping[str, Entry], facts: Mapping[str, str], tokens: bytes | memoryview) -> BlockHeader:
    try:
        lengths = tuple(int(name.split(".")[1]) for name in entries if name.startswith("checkpoint."))
        found = array("i", bytes(tokens))
        start = int(facts["start"])
        key, parent = str(facts["key"]), str(facts["parent"])
    except (ValueError, KeyError, IndexError) as error:
        raise BlockFileError(f"its header is damaged ({error})") from error
    if next(iter(entries), None) != "tokens" or not all(start < length <= start + len(found) for length in lengths):
        raise BlockFileError("its tokens and checkpoints do not fit together")
    return BlockHeader(key=key, parent=parent, start=start, tokens=tuple(found), lengths=lengths)


def _num_bytes(entry: Entry) -> int:
    dtype, shape, _, _ = entry
    return math.prod(shape) * _DTYPES[dtype].size


def _bytes_of(found: mx.array) -> memoryview:
    # An empty view cannot be cast.
    return memoryview(cast(Any, found)).cast("B") if found.size else memoryview(b"")


def _copied(dtype: str, shape: tuple[int, ...], data: memoryview) -> tuple[mx.array, mx.Dtype]:
    import numpy as np  # takes a tenth of a second and 14 MB, and only a prefix cache in a folder needs it

    return mx.array(np.frombuffer(data, dtype=_NUMPY_OF[dtype]).reshape(shape)), _DTYPES[dtype]
