"""Tiny LFM2 models of random weights, for tests that need any model rather than a trained one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.build import build_model
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.model import Model
from lfm_mlx.names import expected_tensors, is_matrix

_HF_MATRIX = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

Stored = Callable[[str], Quantization | None]
"""How the matrix of a module path is to be stored; None leaves it unquantised."""

_TINY = {
    "model_type": "lfm2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "dtype": "float32",
}

_TINY_EXPERTS = {
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 24,
    "num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny mixture of experts, with `changes` to its keys."""
    return {**_TINY, **_TINY_EXPERTS, **changes}


def tiny_dense_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny dense model, with `changes` to its keys."""
    return {**_TINY, **changes}


class RandomWeights:
    """Every tensor of a model, random float32, scaled so that each changes the logits; `lfm_mlx.build.Weights`."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.tensors = {name: _draw(name, shape, generator) for name, shape in expected_tensors(config).items()}
        self.stored: dict[str, Quantization] = {}

    def quantize(self, stored: Stored) -> RandomWeights:
        """Store the matrices that `stored` names in quantised groups."""
        for name in [name for name in self.tensors if is_matrix(name)]:
            path = name.removesuffix(".weight")
            how = stored(path)
            if how is not None:
                parts = mx.quantize(self.tensors[name], group_size=how.group_size, bits=how.bits, mode=how.mode)
                self.tensors |= zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False)
                self.stored[path] = how
        return self

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.tensors

    def tensor(self, name: str) -> mx.array:
        """The tensor."""
        return self.tensors[name]

    def quantization_of(self, name: str) -> Quantization | None:
        """How a matrix is stored."""
        return self.stored.get(name.removesuffix(".weight"))


def tiny_model(
    raw: Mapping[str, Any] | None = None, seed: int = 0, *, dtype: mx.Dtype = mx.float32, stored: Stored | None = None
) -> Model:
    """A model of random weights, by default of `tiny_config()`, without files."""
    config = ModelConfig.from_dict(raw or tiny_config())
    weights = RandomWeights(config, seed)
    return build_model(config, weights if stored is None else weights.quantize(stored), dtype)


def write_checkpoint(
    folder: Path, raw: Mapping[str, Any] | None = None, seed: int = 0, *, stored: Stored | None = None
) -> Path:
    """Write an MLX checkpoint of random weights (no tokenizer) and return its folder.

    Args:
        folder: made if it does not exist.
        raw: config.json, by default `tiny_config()`; with `stored`, its quantization block is added.
        seed: of the weights; the same seed gives `tiny_model` the same ones.
        stored: how each matrix is quantised; None: nothing is.
    """
    raw = dict(raw or tiny_config())
    weights = RandomWeights(ModelConfig.from_dict(raw), seed)
    if stored is not None:
        weights.quantize(stored)
        raw["quantization"] = _quantization_block(weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), weights.tensors, metadata={"format": "mlx"})
    return folder


def as_hugging_face(ours: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Hugging Face's spelling: w1 w3 w2, experts one by one, taps (D, 1, W)."""
    tensors: dict[str, mx.array] = {}
    for name, array in ours.items():
        if ".switch_mlp." in name:
            prefix, matrix = name.removesuffix("_proj.weight").split(".switch_mlp.")
            for i in range(array.shape[0]):
                tensors[f"{prefix}.experts.{i}.{_HF_MATRIX[matrix + '_proj']}.weight"] = array[i]
        elif name.endswith("_proj.weight") and ".feed_forward." in name:
            prefix, matrix = name.removesuffix(".weight").rsplit(".", 1)
            tensors[f"{prefix}.{_HF_MATRIX[matrix]}.weight"] = array
        else:
            tensors[name] = array.transpose(0, 2, 1) if name.endswith(".conv.conv.weight") else array
    return tensors


def write_tensors(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, mx.array], num_shards: int = 1) -> Path:
    """Write tensors as they are, dealt out over shards with an index when there is more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    if num_shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors))
        return folder
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[i::num_shards])
        mx.save_safetensors(str(folder / name), part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def random_weights(raw: Mapping[str, Any], seed: int = 0) -> dict[str, mx.array]:
    """The tensors of `write_checkpoint(folder, raw, seed)`, by our names."""
    return RandomWeights(ModelConfig.from_dict(raw), seed).tensors


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected magnitude; infinite where a value is not finite."""
    found, expected = np.array(found, dtype=np.float64), np.array(expected, dtype=np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return error if np.isfinite(error) else float("inf")


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 97) -> mx.array:
    """Token ids of the tiny vocabulary, int32."""
    return mx.array(np.random.default_rng(seed).integers(0, vocab_size, shape), dtype=mx.int32)


def _draw(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> mx.array:
    values = generator.standard_normal(shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.3 * values
    elif name.endswith("expert_bias"):
        values = 0.2 * values
    elif name.endswith((".conv.conv.weight", ".bias")):
        values = 0.6 * values
    elif "embed_tokens" not in name:
        values = 1.5 * values / shape[-1] ** 0.5
    return mx.array(values.astype(np.float32))


def _quantization_block(weights: RandomWeights) -> dict[str, Any]:
    entries = {path: {"group_size": q.group_size, "bits": q.bits, "mode": q.mode} for path, q in weights.stored.items()}
    return {"group_size": 64, "bits": 4, **entries}
