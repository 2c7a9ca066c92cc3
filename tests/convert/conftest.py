"""Tiny random checkpoints in Hugging Face's layout, written by hand: no name here comes from the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

Config = dict[str, Any]
Weights = dict[str, mx.array]

_SHARED: Config = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LAYER_TYPES = ["conv", "full_attention", "conv", "full_attention"]

MOE: Config = {
    **_SHARED,
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "layer_types": _LAYER_TYPES,
    "rope_theta": 1000000.0,
    "tie_embedding": True,
    "torch_dtype": "bfloat16",
}
DENSE_OLD: Config = {
    **_SHARED,
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "block_dim": 64,
    "block_ff_dim": 192,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": [1, 3],
    "rope_theta": 1000000.0,
    "tie_embedding": True,
    "torch_dtype": "bfloat16",
}
DENSE_NEW: Config = {
    **_SHARED,
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "intermediate_size": 384,
    "layer_types": _LAYER_TYPES,
    "rope_parameters": {"rope_theta": 10000000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
CONFIGS = {"moe": MOE, "dense_old": DENSE_OLD, "dense_new": DENSE_NEW}
FFN_SIZES = {"moe": 128, "dense_old": 128, "dense_new": 256}
"""Feed-forward widths by the two-thirds rule, worked out by hand."""


def hf_weights(config: Config, ffn_size: int, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> Weights:
    """Random weights with Hugging Face's names; expert biases are float32."""
    size, count = config["hidden_size"], config["num_hidden_layers"]
    head_dim = size // config["num_attention_heads"]
    kv_size = config["num_key_value_heads"] * head_dim
    attention = config.get("full_attn_idxs") or [
        i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"
    ]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], size), "model.embedding_norm.weight": (size,)}
    for i in range(count):
        layer = {"operator_norm.weight": (size,), "ffn_norm.weight": (size,)}
        if i in attention:
            layer |= {f"self_attn.{name}_layernorm.weight": (head_dim,) for name in "qk"}
            layer |= {f"self_attn.{name}_proj.weight": (kv_size, size) for name in "kv"}
            layer |= {f"self_attn.{name}_proj.weight": (size, size) for name in ("q", "out")}
        else:
            layer |= {"conv.in_proj.weight": (3 * size, size), "conv.out_proj.weight": (size, size)}
            layer |= {"conv.conv.weight": (size, 1, config["conv_L_cache"])}
        if i >= config.get("num_dense_layers", count):
            layer |= {"feed_forward.gate.weight": (config["num_experts"], size)}
            layer |= {"feed_forward.expert_bias": (config["num_experts"],)}
            for expert in range(config["num_experts"]):
                layer |= _ffn(f"feed_forward.experts.{expert}", config["moe_intermediate_size"], size)
        else:
            layer |= _ffn("feed_forward", ffn_size, size)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {
        name: _values(name, shape, key, mx.float32 if name.endswith("expert_bias") else dtype)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def _ffn(path: str, width: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.w1.weight": (width, size),
        f"{path}.w3.weight": (width, size),
        f"{path}.w2.weight": (size, width),
    }


def _values(name: str, shape: tuple[int, ...], key: mx.array, dtype: mx.Dtype) -> mx.array:
    offset, scale = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.2)
    return (offset + scale * mx.random.normal(shape, key=key)).astype(dtype)


def save_checkpoint(folder: Path, config: Config, weights: Weights, *, num_shards: int = 1) -> Path:
    """Write a checkpoint folder with tokenizer, template and generation config."""
    folder.mkdir(parents=True)
    names = list(weights)
    if num_shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(num_shards):
            file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
            part = {name: weights[name] for name in names[i::num_shards]}
            mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "chat_template.jinja").write_text(
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "LICENSE").write_text("a licence")
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    vocab = {f"t{i}": i for i in range(128)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    for key in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        tokenizer[key] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2", "bos_token": "t1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a geometry; a test that takes it runs once for each."""
    return str(request.param)


@pytest.fixture(scope="session")
def configs() -> dict[str, Config]:
    """config.json of each geometry."""
    return CONFIGS


@pytest.fixture(scope="session")
def ffn_sizes() -> dict[str, int]:
    """The dense feed-forward width of each geometry."""
    return FFN_SIZES


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bfloat16 checkpoint of each geometry, in three shards; not to be changed."""
    parent = tmp_path_factory.mktemp("sources")
    return {
        name: save_checkpoint(parent / name, config, hf_weights(config, FFN_SIZES[name]), num_shards=3)
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Weights]:
    """The function `hf_weights`."""
    return hf_weights


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """The function `save_checkpoint`."""
    return save_checkpoint
