"""config.json of every published model gives its published sizes and parameter count (values from the model cards)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lfm_mlx.config import ModelConfig
from lfm_mlx.names import expected_tensors

ATTENTION_16 = [2, 5, 8, 10, 12, 14]
ATTENTION_30 = [2, 5, 9, 13, 17, 21, 24, 27]
ATTENTION_24 = [2, 6, 10, 14, 18, 21]


def layer_types(count: int, attention: list[int]) -> list[str]:
    return ["full_attention" if i in attention else "conv" for i in range(count)]


def old_dense(width: int, heads: int, ff: int, layers: int = 16, *, is_adjusted: bool = True) -> dict[str, Any]:
    """config.json as the first LFM2 checkpoints spell it."""
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": is_adjusted,
        "block_dim": width,
        "block_ff_dim": ff,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "block_norm_eps": 1e-5,
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": width,
        "conv_dim_out": width,
        "eos_token_id": 7,
        "full_attn_idxs": ATTENTION_16 if layers == 16 else ATTENTION_30,
        "hidden_size": width,
        "max_position_embeddings": 128000,
        "num_attention_heads": heads,
        "num_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "theta": 1000000.0,
        "tie_embedding": True,
        "torch_dtype": "bfloat16",
        "use_pos_enc": True,
        "vocab_size": 65536,
    }


def new_dense(**changes: Any) -> dict[str, Any]:
    """config.json of LFM2.5-2.6B, in transformers 5's spelling."""
    return {
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": False,
        "bos_token_id": 124894,
        "conv_L_cache": 3,
        "conv_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": 124900,
        "hidden_size": 2048,
        "intermediate_size": 10752,
        "layer_types": layer_types(30, ATTENTION_30),
        "max_position_embeddings": 131072,
        "norm_eps": 1e-5,
        "num_attention_heads": 32,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "pad_token_id": 124893,
        "rope_parameters": {"rope_theta": 10000000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 128000,
        **changes,
    }


def experts(**changes: Any) -> dict[str, Any]:
    """config.json of LFM2-8B-A1B."""
    return {
        "model_type": "lfm2_moe",
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": 7,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "layer_types": layer_types(24, ATTENTION_24),
        "max_position_embeddings": 128000,
        "moe_intermediate_size": 1792,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0,
        "tie_embedding": True,
        "use_expert_bias": True,
        "vocab_size": 65536,
        **changes,
    }


LFM25_8B = experts(
    vocab_size=128000,
    bos_token_id=124894,
    eos_token_id=124900,
    pad_token_id=124893,
    rope_parameters={"rope_theta": 5000000.0, "rope_type": "default"},
)
LFM25_230M = new_dense(
    hidden_size=1024,
    num_attention_heads=16,
    num_hidden_layers=14,
    layer_types=layer_types(14, [2, 4, 6, 8, 10, 12]),
    intermediate_size=2560,
    vocab_size=65536,
    bos_token_id=1,
    eos_token_id=7,
    pad_token_id=0,
    rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
)

PUBLISHED = {
    "LFM2-350M": (old_dense(1024, 16, 6656), 354_483_968, 4608, 64, 1e6),
    "LFM2-700M": (old_dense(1536, 24, 10240), 742_489_344, 6912, 64, 1e6),
    "LFM2-1.2B": (old_dense(2048, 32, 12288), 1_170_340_608, 8192, 64, 1e6),
    "LFM2-2.6B": (old_dense(2048, 32, 10752, 30, is_adjusted=False), 2_569_272_320, 10752, 64, 1e6),
    "LFM2.5-2.6B": (new_dense(), 2_697_198_592, 10752, 64, 1e7),
    "LFM2.5-230M": (LFM25_230M, 229_693_184, 2560, 64, 1e6),
    "LFM2-8B-A1B": (experts(), 8_339_930_560, 7168, 64, 1e6),
    "LFM2.5-8B-A1B": (LFM25_8B, 8_467_856_832, 7168, 64, 5e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_sizes_and_parameter_count(name):
    raw, num_parameters, ffn_size, head_dim, rope_theta = PUBLISHED[name]
    config = ModelConfig.from_dict(raw)
    assert config.ffn_size == ffn_size
    assert config.head_dim == head_dim
    assert config.rope_theta == rope_theta
    assert sum(math.prod(shape) for shape in expected_tensors(config).values()) == num_parameters


def test_lfm2_24b_has_the_published_parameter_count_with_the_assumed_dense_width():
    changes = {"intermediate_size": 11776, "moe_intermediate_size": 1536, "num_experts": 64, "num_hidden_layers": 40}
    attention = list(range(2, 40, 4))
    config = ModelConfig.from_dict(experts(**changes, layer_types=layer_types(40, attention)))
    total = sum(math.prod(shape) for shape in expected_tensors(config).values())
    assert len(config.attention_layers) == 10
    assert round(total / 1e9, 2) == 23.84


def test_lfm25_8b_gives_every_derived_value():
    config = ModelConfig.from_dict(LFM25_8B)
    assert config.attention_layers == tuple(ATTENTION_24)
    assert [config.has_experts(i) for i in range(4)] == [False, False, True, True]
    assert config.is_moe
    assert config.kv_bytes_per_token == 12_288
    assert (config.num_experts, config.num_active_experts, config.expert_ffn_size) == (32, 4, 1792)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (124894, (124900,), 124893)
    assert config.max_context == 128_000
    assert config.use_expert_bias
    assert config.normalize_expert_weights
    assert config.raw == LFM25_8B


def test_the_two_thirds_rule_is_on_unless_the_config_turns_it_off_and_never_applies_to_experts():
    raw = new_dense(intermediate_size=12288)
    assert ModelConfig.from_dict(raw).ffn_size == 12288
    del raw["block_auto_adjust_ff_dim"]
    assert ModelConfig.from_dict(raw).ffn_size == 8192
    assert ModelConfig.from_dict(raw | {"block_ffn_dim_multiplier": 1.3}).ffn_size == 10752
    assert ModelConfig.from_dict(raw | {"block_ffn_dim_multiplier": None, "intermediate_size": 100}).ffn_size == 66
    assert ModelConfig.from_dict(experts(block_auto_adjust_ff_dim=True)).ffn_size == 7168
