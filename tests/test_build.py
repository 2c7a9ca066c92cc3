"""Models built from quantised and foreign checkpoints compute what their weights say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from random_models import (
    RandomWeights,
    Stored,
    random_tokens,
    relative_error,
    tiny_config,
    tiny_dense_config,
    tiny_model,
    write_checkpoint,
)

from lfm_mlx.build import build_model
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.model import Model, MoE, QuantizedLinear, SplitExpertLinear, SplitLinear

TOLERANCE = 1e-5
BROKEN = 1e-3

SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
MOE = tiny_config(**SIZES)
DENSE = tiny_dense_config(hidden_size=128, intermediate_size=64)

AFFINE_4 = Quantization(group_size=64, bits=4)
AFFINE_8 = Quantization(group_size=32, bits=8)


def all_as(how: Quantization) -> Stored:
    return lambda path: how


def mlx_lm_4_bit(path: str) -> Quantization:
    """The router in 8 bits, the rest in 4: what mlx-lm writes."""
    return Quantization(group_size=64, bits=8) if path.endswith("feed_forward.gate") else AFFINE_4


def mixed(path: str) -> Quantization | None:
    """Everything that can differ, differs: q, k and v; gate and up; layers; modes; an embedding in 6 bits."""
    by_ending = {
        "embed_tokens": Quantization(group_size=64, bits=6),
        "q_proj": Quantization(group_size=64, bits=4),
        "k_proj": Quantization(group_size=32, bits=8),
        "v_proj": None,
        "switch_mlp.gate_proj": Quantization(group_size=32, bits=3),
        "switch_mlp.up_proj": Quantization(group_size=32, bits=4, mode="mxfp4"),
        "switch_mlp.down_proj": Quantization(group_size=64, bits=5),
        "feed_forward.gate": None,
        "w1": Quantization(group_size=64, bits=2),
        "w3": Quantization(group_size=16, bits=4, mode="nvfp4"),
    }
    for ending, how in by_ending.items():
        if path.endswith(ending):
            return how
    return AFFINE_8


RECIPES: dict[str, Stored] = {
    "affine_2": lambda path: Quantization(group_size=64 if "feed_forward" in path else 128, bits=2),
    "affine_3": all_as(Quantization(group_size=64, bits=3)),
    "affine_4": all_as(AFFINE_4),
    "affine_5": all_as(Quantization(group_size=32, bits=5)),
    "affine_6": all_as(Quantization(group_size=64, bits=6)),
    "affine_8": all_as(AFFINE_8),
    "mxfp4": all_as(Quantization(group_size=32, bits=4, mode="mxfp4")),
    "nvfp4": all_as(Quantization(group_size=16, bits=4, mode="nvfp4")),
    "mxfp8": all_as(Quantization(group_size=32, bits=8, mode="mxfp8")),
    "mlx_lm_4_bit": mlx_lm_4_bit,
    "mixed": mixed,
}


class Dequantized:
    """The tensors of quantised weights, multiplied out; `lfm_mlx.build.Weights`."""

    def __init__(self, weights: RandomWeights) -> None:
        self.weights = weights

    def has(self, name: str) -> bool:
        """As `Weights`."""
        return self.weights.has(name) and not name.endswith((".scales", ".biases"))

    def quantization_of(self, name: str) -> None:
        """Nothing is quantised."""

    def tensor(self, name: str) -> mx.array:
        """The tensor in float32."""
        how = self.weights.quantization_of(name)
        if how is None:
            return self.weights.tensor(name)
        path = name.removesuffix(".weight")
        scales, biases = (self.weights.tensors.get(f"{path}.{which}") for which in ("scales", "biases"))
        return mx.dequantize(
            self.weights.tensor(name),
            scales,
            biases,
            group_size=how.group_size,
            bits=how.bits,
            mode=how.mode,
            dtype=mx.float32,
        )


@pytest.mark.parametrize("raw", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantised_checkpoint_computes_what_its_dequantised_weights_compute(tmp_path, recipe, raw):
    stored = RECIPES[recipe]
    checkpoint = Checkpoint(write_checkpoint(tmp_path, raw, stored=stored))
    config = ModelConfig.from_dict(raw)
    weights = RandomWeights(config).quantize(stored)
    quantised = build_model(checkpoint.config, checkpoint, mx.float32)
    plain = build_model(config, Dequantized(weights), mx.float32)
    for tokens in (random_tokens(1, 5), random_tokens(2, 40)):
        expected = plain(tokens)
        assert relative_error(quantised(tokens), expected) < TOLERANCE
        assert relative_error(tiny_model(raw)(tokens), expected) > BROKEN


def test_matrices_of_one_storage_are_fused_and_others_kept_apart():
    model = tiny_model(MOE, stored=mixed)
    attention, moe = model.layers[1].operator, model.layers[1].feed_forward
    assert isinstance(attention.qkv_proj, SplitLinear)
    assert isinstance(moe.gate_up_proj, SplitExpertLinear)
    fused = tiny_model(MOE, stored=all_as(AFFINE_4))
    assert isinstance(fused.layers[1].operator.qkv_proj, QuantizedLinear)
    assert fused.layers[1].operator.qkv_proj.weight.shape[0] == 128 + 2 * 64
    assert fused.layers[1].feed_forward.gate_up_proj.weight.shape[:2] == (8, 2 * 64)


def test_a_bias_stays_with_its_quantised_matrix():
    raw = MOE | {"conv_bias": True}
    weights = RandomWeights(ModelConfig.from_dict(raw)).quantize(all_as(AFFINE_8))
    tokens = random_tokens(1, 9)
    expected = build_model(ModelConfig.from_dict(raw), Dequantized(weights), mx.float32)(tokens)
    assert relative_error(tiny_model(raw, stored=all_as(AFFINE_8))(tokens), expected) < TOLERANCE
    without = tiny_model(raw, stored=all_as(AFFINE_8))
    for layer in (without.layers[0], without.layers[2]):
        layer.operator.in_proj.bias = mx.zeros_like(layer.operator.in_proj.bias)
    assert relative_error(without(tokens), expected) > BROKEN


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_a_quantised_model_in_16_bits_stays_close_to_float32(dtype):
    tokens = random_tokens(1, 12)
    expected = tiny_model(DENSE, stored=mixed)(tokens)
    model = tiny_model(DENSE, dtype=dtype, stored=mixed)
    found = model(tokens, model.new_state())
    assert found.dtype == dtype
    assert relative_error(found.astype(mx.float32), expected) < 0.1


def test_router_bias_and_taps_stay_float32_whatever_the_dtype():
    model = tiny_model(MOE, dtype=mx.bfloat16, stored=mlx_lm_4_bit)
    kept = {name for name, array in tree_flatten(model.parameters()) if array.dtype == mx.float32}
    assert kept == {
        name for name, _ in tree_flatten(model.parameters()) if name.endswith("expert_bias") or ".taps." in name
    }
    assert len(kept) == 3 + 2 * 3


def test_parts_are_reported_with_their_bytes_as_they_arrive():
    weights = RandomWeights(ModelConfig.from_dict(MOE))
    parts: list[int] = []
    model = build_model(ModelConfig.from_dict(MOE), weights, mx.float32, parts.append)
    assert len(parts) == 4 + 2
    assert sum(parts) == model.num_bytes
    heads = 2 * ((4 + 2) * 32 - 2 * 32) * 4
    assert model.num_bytes == sum(array.nbytes for array in weights.tensors.values()) + heads


# mlx-lm's own checkpoints.

OLD_KEYS = {
    "block_dim": 128,
    "block_ff_dim": 64,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "full_attn_idxs": [1, 3],
    "rope_theta": 1e6,
}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "moe": ("lfm2_moe", MOE | {"rope_theta": 1e6}),
    "dense": ("lfm2", DENSE | OLD_KEYS),
    "dense_with_rule": ("lfm2", DENSE | OLD_KEYS | {"block_auto_adjust_ff_dim": True, "block_ff_dim": 96}),
}


def foreign_checkpoint(folder: Path, name: str, *, is_quantised: bool) -> Module:
    """Save random weights through mlx-lm, and return its model of them."""
    from mlx_lm.utils import quantize_model, save_model  # slow: transformers comes with it

    module_name, raw = FOREIGN[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    model = module.Model(module.ModelArgs.from_dict(raw))
    model.load_weights(list(RandomWeights(ModelConfig.from_dict(raw)).tensors.items()))
    config = dict(raw)
    if is_quantised:
        predicate: Callable[..., Any] | None = getattr(model, "quant_predicate", None)
        model, config = quantize_model(model, config, group_size=64, bits=4, quant_predicate=predicate)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("is_quantised", [False, True], ids=["plain", "4_bit"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_that_mlx_lm_saved_gives_the_logits_of_mlx_lm(tmp_path, name, is_quantised):
    theirs = foreign_checkpoint(tmp_path, name, is_quantised=is_quantised)
    checkpoint = Checkpoint(tmp_path)
    ours: Model = build_model(checkpoint.config, checkpoint, mx.float32)
    for tokens in (random_tokens(1, 7), random_tokens(2, 40)):
        expected = theirs(tokens)
        assert relative_error(ours(tokens), expected) < TOLERANCE
    changed = tiny_model(FOREIGN[name][1], seed=1)
    assert relative_error(changed(tokens), expected) > BROKEN
    assert (checkpoint.config.quantization is not None) == is_quantised
    assert all(isinstance(layer.feed_forward, MoE) for layer in ours.layers[1:]) == (name == "moe")
