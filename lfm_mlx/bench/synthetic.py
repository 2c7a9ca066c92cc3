"""Checkpoints of any size in Hugging Face's layout, with random weights: for converters, which do not mind.

``python -m lfm_mlx.bench synthetic --shapes lfm2.5-8b-a1b --out FOLDER`` writes 16.9 GB as fast as the disk takes them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from lfm_mlx.bench.shapes import SHAPES, TAILS, config_named
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import OptionError
from lfm_mlx.names import Shape, expected_tensors, is_matrix

_HF_MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_CHUNK = 1 << 24
_LEVELS = 1 << 16
_WORDS = 1024
"""Words of the tokenizer, at most."""


def write_synthetic(shapes: str, out: Path, *, num_shards: int = 4, tails: str = "normal", seed: int = 0) -> int:
    """Write a checkpoint of random bfloat16 weights.

    Args:
        shapes: the name of a geometry.
        out: the folder to make; it must not exist.
        num_shards: files of weights, about equally large.
        tails: one of `TAILS`.
        seed: the same seed gives the same bytes.

    Returns:
        Bytes of all tensors.

    Raises:
        OptionError: there is no such geometry or distribution, or `out` exists.
    """
    config = config_named(shapes)
    if tails not in TAILS:
        raise OptionError(f"tails is {tails!r}, expected one of {', '.join(TAILS)}")
    if out.exists():
        raise OptionError(f"out is {out}, which exists, expected a new folder; name another one")
    out.mkdir(parents=True)
    tensors = dict(_hf_tensors(config))
    total = sum(_num_bytes(name, shape) for name, shape in tensors.items())
    source = _Values(tails, seed)
    weight_map: dict[str, str] = {}
    files = list(_shards(tensors, total / num_shards))
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        _write_shard(out / file, {name: tensors[name] for name in names}, source)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(_config(shapes, config), indent=2))
    words = min(config.vocab_size, _WORDS)
    _write_tokenizer(out, words)
    _write_evaluation(out, words, seed)
    return total


def _hf_tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    for name, shape in expected_tensors(config).items():
        if ".switch_mlp." in name:
            layer, matrix = name.removesuffix("_proj.weight").split(".switch_mlp.")
            for expert in range(shape[0]):
                yield f"{layer}.experts.{expert}.{_HF_MATRICES[f'{matrix}_proj']}.weight", shape[1:]
        elif name.endswith("conv.conv.weight"):
            yield name, (shape[0], shape[2], shape[1])
        else:
            path = name.removesuffix(".weight")
            stem, _, matrix = path.rpartition(".")
            yield (f"{stem}.{_HF_MATRICES[matrix]}.weight" if matrix in _HF_MATRICES else name), shape


def _num_bytes(name: str, shape: Shape) -> int:
    return math.prod(shape) * (4 if name.endswith("expert_bias") else 2)


def _shards(tensors: Mapping[str, Shape], limit: float) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in tensors.items():
        names.append(name)
        size += _num_bytes(name, shape)
        if size >= limit:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(file: Path, tensors: Mapping[str, Shape], source: _Values) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + _num_bytes(name, shape)
        dtype = "F32" if name.endswith("expert_bias") else "BF16"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            source.write(stream, name, shape)


class _Values:
    """Random values: uniform 16-bit numbers look up the quantiles of a distribution, which is ten times faster."""

    def __init__(self, tails: str, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        draw: Callable[[int], NDArray[np.float64]] = self._random.standard_normal
        if tails == "heavy":
            draw = lambda count: self._random.standard_t(3, count)  # noqa: E731
        self._quantiles = draw(_LEVELS) / draw(1 << 20).std()

    def write(self, stream: BinaryIO, name: str, shape: Shape) -> None:
        count = math.prod(shape)
        if name.endswith("expert_bias"):
            stream.write((self._random.standard_normal(count) * 0.01).astype(np.float32).tobytes())
            return
        table = self._table(name, shape)
        for done in range(0, count, _CHUNK):
            codes = np.frombuffer(self._random.bytes(2 * min(_CHUNK, count - done)), np.uint16)
            stream.write(table[codes].tobytes())

    def _table(self, name: str, shape: Shape) -> NDArray[np.uint16]:
        """The bits of the bfloat16 values that a tensor is drawn from."""
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * self._quantiles
        else:
            width = 3 if name.endswith(".conv.conv.weight") else shape[-1]
            values = self._quantiles / math.sqrt(width if is_matrix(name) else 3 * width)
        rounded = mx.array(values.astype(np.float32)).astype(mx.bfloat16).view(mx.uint16)
        return np.array(rounded)


def _config(shapes: str, config: ModelConfig) -> dict[str, Any]:
    raw = {key: value for key, value in SHAPES[shapes].items() if key != "full_attn_idxs"}
    kind = "Lfm2MoeForCausalLM" if config.model_type == "lfm2_moe" else "Lfm2ForCausalLM"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {**raw, **ids, "architectures": [kind], "layer_types": list(config.layer_types), "torch_dtype": "bfloat16"}


def _write_tokenizer(out: Path, num_words: int) -> None:
    """A tokenizer of a few words: other converters do not work without one."""
    words = {f"t{i}": i for i in range(num_words)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        "pre_tokenizer": {"type": "Whitespace"},
        **empty,
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2", "bos_token": "t1"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_evaluation(out: Path, num_words: int, seed: int) -> None:
    """Texts of random words, for ``python -m lfm_mlx.convert report --evaluation``."""
    random = np.random.default_rng(seed)
    texts = [" ".join(f"t{i}" for i in random.integers(num_words, size=256)) for _ in range(4)]
    (out / "evaluation.json").write_text(json.dumps({"texts": [{"text": text} for text in texts]}))
