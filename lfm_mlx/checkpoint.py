"""A checkpoint folder, in whatever spelling, seen as the tensors of our run-time format.

Headers are read and every tensor is accounted for before any weight is; weights are read lazily, one by one. The
safetensors layout (8 bytes of header length, a JSON header, the data) is described at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from lfm_mlx.config import ModelConfig, Quantization, read_config
from lfm_mlx.distributed import Cut, RankPart, part_bytes, read_ranges, take_part
from lfm_mlx.errors import CheckpointError
from lfm_mlx.names import Part, Shape, expected_tensors, is_matrix, parts_of

_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U64": 8, "I64": 8, "U32": 4, "I32": 4, "U8": 1, "I8": 1}
_MAX_HEADER_BYTES = 100 << 20
_MAX_AXES = 8
_MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor as its file's header describes it; `offset` counts bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: Shape
    num_bytes: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One stored tensor and what it contributes to one of ours."""

    info: TensorInfo
    part: Part


class Checkpoint:
    """A checked checkpoint: config, and our tensors by name, each assembled from what is stored when asked for.

    Args:
        folder: holds config.json and safetensors files (Hugging Face's or an MLX checkpoint).

    Raises:
        CheckpointError: a file is missing or truncated, or tensors are missing, extra or misshapen; one error lists
            them all.
        ConfigError: config.json holds a value that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: ModelConfig = read_config(folder)
        self.files = _weight_files(folder)
        problems: list[str] = []
        self._sources = _group_sources(_read_headers(folder, self.files, problems), self.config)
        # What a damaged file should have held would only repeat its one cause tensor by tensor.
        problems = problems or _check_tensors(self._sources, self.config)
        if problems:
            raise CheckpointError(_report(folder, problems))
        self._opened: dict[Path, dict[str, mx.array]] = {}

    @property
    def names(self) -> list[str]:
        """Names of all our tensors that this checkpoint yields, in the order of the forward pass."""
        order = [name for base in expected_tensors(self.config) for name in _with_quantized(base)]
        return [name for name in order if name in self._sources]

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors that are used."""
        infos = {source.info for sources in self._sources.values() for source in sources}
        return sum(info.num_bytes for info in infos)

    def memory_bytes(self, dtype_bytes: int, part: RankPart | None = None) -> int:
        """Bytes of all tensors in memory when floating-point ones have `dtype_bytes` bytes each.

        Args:
            dtype_bytes: 2 or 4.
            part: counts what one rank holds; None counts all.
        """
        total = 0
        for name, sources in self._sources.items():
            infos = [source.info for source in sources]
            each = [math.prod(i.shape) * dtype_bytes if i.dtype in _FLOATS else i.num_bytes for i in infos]
            whole = sum(each) // (1 if sources[0].part.rows is None else 2)
            total += whole if part is None else part_bytes(name, whole, part)
        return total

    def stored_bytes(self, name: str) -> int:
        """Bytes that have to be read to assemble our tensor `name`."""
        return sum(source.info.num_bytes for source in self._sources[name])

    def quantization_of(self, name: str) -> Quantization | None:
        """How the matrix ``X.weight`` is stored, or None when it is unquantised."""
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in self._sources:
            return None
        assert self.config.quantization is not None
        return self.config.quantization.of(path)

    def has(self, name: str) -> bool:
        """Whether the checkpoint yields our tensor `name`."""
        return name in self._sources

    def sources(self, name: str) -> list[Source]:
        """What our tensor `name` is assembled from, an expert's slices in the order of the experts."""
        return sorted(self._sources[name], key=lambda source: source.part.expert or 0)

    def tensor(self, name: str) -> mx.array:
        """Our tensor `name` as an unevaluated array; nothing of it is kept here."""
        sources = self.sources(name)
        if sources[0].part.expert is not None:
            return mx.stack([self._stored(source.info) for source in sources])
        (source,) = sources
        array = self._stored(source.info)
        if source.part.rows is not None:
            half = array.shape[1] // 2
            return array[:, source.part.rows * half : (source.part.rows + 1) * half]
        if source.part.is_taps and array.shape[1] == 1 and array.shape[2] != 1:
            return array.transpose(0, 2, 1)
        return array

    def tensor_part(self, name: str, cut: Cut, part: RankPart) -> mx.array:
        """One rank's part of our tensor `name`; of the other parts, a few megabytes are in memory at a time.

        Args:
            name: of a tensor that is cut.
            cut: how.
            part: the rank's.
        """
        sources = self.sources(name)
        if sources[0].part.expert is not None:
            if cut.axis == 0:
                return mx.stack([self._stored(sources[expert].info) for expert in part.of(len(sources))])
            return mx.stack([_read_part(source.info, cut.axis - 1, cut, part) for source in sources])
        (source,) = sources
        if source.part.rows is not None or source.part.is_taps:
            return take_part(self.tensor(name), cut, part)
        return _read_part(source.info, cut.axis % len(source.info.shape), cut, part)

    def _stored(self, info: TensorInfo) -> mx.array:
        """The stored tensor, lazily; a file's other tensors stay unread."""
        opened = self._opened.get(info.file, {})
        if info.name not in opened:
            opened = self._opened[info.file] = _open_file(info.file)
        return opened.pop(info.name)


def _read_part(info: TensorInfo, axis: int, cut: Cut, part: RankPart) -> mx.array:
    try:
        array = read_ranges(info.file, info.offset, info.shape, info.dtype, axis, cut.ranges(info.shape[axis], part))
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error}); fetch the file again") from error
    return array


def _open_file(file: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(file))
    except (RuntimeError, ValueError, IndexError) as error:  # what MLX's C++ exceptions become
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch the file again") from error
    assert isinstance(loaded, dict)
    return loaded


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder: those its index names, or all that are called model*.safetensors."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = [Path(name) for name in sorted(set(weight_map.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: no usable weight_map ({error}); fetch the checkpoint again") from error
        if outside := [str(file) for file in shards if file.is_absolute() or ".." in file.parts]:
            raise CheckpointError(f"{index}: weight_map names {outside[0]!r}, expected files of this folder")
        return tuple(folder / file for file in shards)
    for pattern in ("model*.safetensors", "weights*.safetensors"):
        if files := tuple(sorted(folder.glob(pattern))):
            return files
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise CheckpointError(
        f"{folder}: no weights, found {found}; expected model.safetensors, or shards with {_INDEX}; "
        "name the folder that holds them (a repo may keep precisions in subfolders)"
    )


def _read_headers(folder: Path, files: Iterable[Path], problems: list[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not os.path.isfile(file):
            problems.append(f"{file.name}: not found, but {_INDEX} names it; fetch it again")
            continue
        try:
            found = read_header(file)
        except CheckpointError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
            continue
        for name in sorted(tensors.keys() & found.keys()):
            problems.append(f"{name}: stored twice, in {tensors[name].file.name} and {file.name}, expected once")
        tensors |= found
    problems += _unlisted(folder, tensors) if not problems else []
    return tensors


def _unlisted(folder: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors that the index promises and no shard holds."""
    index = folder / _INDEX
    if not index.is_file():
        return []
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    lost = ((name, file) for name, file in weight_map.items() if name not in tensors)
    return [f"{name}: {_INDEX} places it in {file}, which does not hold it" for name, file in lost]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file describes, after checking that the file is as long as it says.

    Raises:
        CheckpointError: the file is not safetensors, or is truncated.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            return _parse_header(file, size, stream)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); check the file's permissions") from error


def _parse_header(file: Path, size: int, stream: BinaryIO) -> dict[str, TensorInfo]:
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{file}: {size:,} bytes that do not start with a safetensors header; the file is truncated or is "
            "something else (a Git LFS pointer?); fetch it again"
        )
    header_bytes = stream.read(length)
    try:
        header = json.loads(header_bytes, parse_constant=_refuse_constant)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor_info(name, entry, file, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged safetensors header ({error}); fetch the file again") from error
    needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < needed:
        raise CheckpointError(f"{file}: {size:,} bytes, expected {needed:,}; the file is truncated, fetch it again")
    return tensors


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _tensor_info(name: str, entry: Mapping[str, Any], file: Path, start: int) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > _MAX_AXES:
        raise ValueError(f"{name} has dtype {dtype!r:.40} and shape {shape!r:.80}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, begin, end]):
        raise ValueError(f"{name} has shape {shape!r:.80} and data from {begin!r:.40} to {end!r:.40}")
    num_bytes = end - begin
    needed = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if num_bytes < 0 or (dtype in _ITEM_BYTES and num_bytes != needed):
        raise ValueError(f"{name} has {num_bytes:,} bytes of data, expected {needed:,} for {dtype} {tuple(shape)}")
    return TensorInfo(name=name, file=file, dtype=dtype, shape=tuple(shape), num_bytes=num_bytes, offset=start + begin)


def _group_sources(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, list[Source]]:
    grouped: dict[str, list[Source]] = {}
    for name, info in tensors.items():
        for part in parts_of(name, config):
            grouped.setdefault(part.target, []).append(Source(info=info, part=part))
    return grouped


def _check_tensors(sources: Mapping[str, list[Source]], config: ModelConfig) -> list[str]:
    """Every tensor that is missing, extra, of the wrong shape or of the wrong type."""
    problems: list[str] = []
    known: set[str] = set()
    for name, shape in expected_tensors(config).items():
        path = name.removesuffix(".weight")
        if is_matrix(name) and f"{path}.scales" in sources:
            known |= set(_with_quantized(name))
            problems += _check_quantized(path, shape, sources, config)
        else:
            known.add(name)
            problems += _check_plain(name, shape, sources.get(name), config)
    for name in sorted(sources.keys() - known):
        for source in sources[name]:
            problems.append(
                f"{source.info.file.name}: {source.info.name} {source.info.shape} has no place in this model"
            )
    return problems


def _check_plain(name: str, shape: Shape, sources: list[Source] | None, config: ModelConfig) -> list[str]:
    if not sources:
        return [f"{name} is missing, expected {shape}"]
    if sources[0].part.expert is not None:
        experts = sorted(source.part.expert or 0 for source in sources)
        if experts != list(range(config.num_experts)):
            absent = sorted(set(range(config.num_experts)) - set(experts))
            extra = sorted(set(experts) - set(range(config.num_experts)))
            return [
                f"{name}: experts {absent or 'none'} missing, {extra or 'none'} extra, expected {config.num_experts}"
            ]
        shape = shape[1:]
    elif len(sources) > 1:
        return [f"{name}: stored {len(sources)} times, as {', '.join(source.info.name for source in sources)}"]
    problems = []
    for source in sources:
        allowed = _stored_shapes(shape, source.part)
        info = source.info
        if info.shape not in allowed:
            problems.append(f"{info.file.name}: {info.name} is {info.shape}, expected {allowed[0]}")
        elif info.dtype not in _FLOATS:
            problems.append(f"{info.file.name}: {info.name} is {info.dtype}, expected one of {', '.join(_FLOATS)}")
    return problems


def _stored_shapes(shape: Shape, part: Part) -> tuple[Shape, ...]:
    if part.rows is not None:
        return ((shape[0], 2 * shape[1], shape[2]),)
    if part.is_taps:
        return shape, (shape[0], shape[2], shape[1])
    return (shape,)


def _check_quantized(path: str, shape: Shape, sources: Mapping[str, list[Source]], config: ModelConfig) -> list[str]:
    if config.quantization is None:
        return [f"{path}.scales is stored, but config.json has no quantization block"]
    stored = config.quantization.of(path)
    if stored is None:
        return [f"{path}.scales is stored, but config.json's quantization says false for it"]
    if shape[-1] % stored.group_size:
        return [f"{path} has rows of {shape[-1]} values, expected a multiple of group_size {stored.group_size}"]
    problems = []
    for name, expected in _quantized_shapes(path, shape, stored).items():
        found = sources.get(name)
        if not found:
            problems.append(f"{name} is missing, expected {expected}")
            continue
        info = found[0].info
        allowed = _quantized_dtypes(name, stored)
        if len(found) > 1:
            problems.append(f"{name}: stored {len(found)} times, as {', '.join(s.info.name for s in found)}")
        elif info.shape != expected:
            problems.append(
                f"{info.file.name}: {info.name} is {info.shape}, expected {expected} "
                f"({stored.bits} bits in groups of {stored.group_size}, {stored.mode})"
            )
        elif info.dtype not in allowed:
            problems.append(f"{info.file.name}: {info.name} is {info.dtype}, expected {' or '.join(allowed)}")
    if stored.mode != "affine" and f"{path}.biases" in sources:
        problems.append(f"{path}.biases is stored, but mode {stored.mode} has none")
    return problems


def _quantized_shapes(path: str, shape: Shape, stored: Quantization) -> dict[str, Shape]:
    *outer, width = shape
    groups = (*outer, width // stored.group_size)
    shapes = {f"{path}.weight": (*outer, width * stored.bits // 32), f"{path}.scales": groups}
    if stored.mode == "affine":
        shapes[f"{path}.biases"] = groups
    return shapes


def _quantized_dtypes(name: str, stored: Quantization) -> tuple[str, ...]:
    if name.endswith(".weight"):
        return ("U32",)
    return _FLOATS if stored.mode == "affine" else ("U8",)


def _with_quantized(name: str) -> tuple[str, ...]:
    path = name.removesuffix(".weight")
    return (name, f"{path}.scales", f"{path}.biases") if is_matrix(name) else (name,)


def _report(folder: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{folder}: {problems[0]}"
    more = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    listed = "\n  ".join(problems[:_MAX_LISTED] + more)
    return f"{folder}: {len(problems)} problems; the files do not fit config.json:\n  {listed}"
