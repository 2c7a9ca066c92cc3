"""Old and new keys of config.json mean the same; every wrong value is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import tiny_config, tiny_dense_config

from lfm_mlx.config import ModelConfig, Quantization, read_config
from lfm_mlx.errors import CheckpointError, ConfigError
from lfm_mlx.names import expected_tensors

EQUIVALENT = {
    "hidden_size": ({"block_dim": 32}, "hidden_size", 32),
    "num_attention_heads": ({"num_heads": 4}, "num_heads", 4),
    "layer_types": ({"full_attn_idxs": [1, 3]}, "attention_layers", (1, 3)),
    "intermediate_size": ({"block_ff_dim": 48}, "ffn_size", 48),
    "norm_eps": ({"block_norm_eps": 1e-5}, "norm_eps", 1e-5),
    "rope_parameters": ({"rope_theta": 1e6}, "rope_theta", 1e6),
    "tie_word_embeddings": ({"tie_embedding": True}, "tie_embeddings", True),
    "dtype": ({"torch_dtype": "float32"}, "dtype", "float32"),
}


@pytest.mark.parametrize("key", EQUIVALENT)
def test_an_old_key_means_the_same_as_the_new_one(key):
    raw = tiny_dense_config()
    old, field, value = EQUIVALENT[key]
    del raw[key]
    config = ModelConfig.from_dict({**raw, **old})
    assert getattr(config, field) == value
    assert config == ModelConfig.from_dict(tiny_dense_config())


@pytest.mark.parametrize(
    ("old", "field", "value"),
    [
        ({"block_ff_dim": 96}, "ffn_size", 96),
        ({"tie_embedding": False}, "tie_embeddings", False),
        ({"rope_theta": 5.0}, "rope_theta", 1e6),
        ({"head_dim": 12}, "head_dim", 12),
        ({"eos_token_id": [7, 2]}, "eos_token_ids", (7, 2)),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"pad_token_id": -1}, "pad_token_id", None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5.0}, "rope_theta", 5.0),
        ({"dtype": "torch.bfloat16"}, "dtype", "bfloat16"),
        ({"conv_L_cache": 4.0}, "conv_taps", 4),
    ],
    ids=str,
)
def test_where_two_spellings_meet_the_one_that_transformers_prefers_wins(old, field, value):
    assert getattr(ModelConfig.from_dict(tiny_dense_config(**old)), field) == value


NESTED: Any = 1
for _ in range(300):
    NESTED = [NESTED]

REFUSED = [
    ("model_type", None, "model_type is missing, expected lfm2 or lfm2_moe"),
    ("model_type", "lfm3", "model_type is 'lfm3', which is not supported, expected lfm2 or lfm2_moe .*nearest known"),
    ("model_type", "lfm2_vl", "model_type is 'lfm2_vl', a vision-language model, expected lfm2 or lfm2_moe"),
    ("model_type", "llama", "model_type is 'llama', which is not supported"),
    ("model_type", 5, "model_type is 5"),
    ("model_type", ["lfm2"], "model_type is .'lfm2'.*expected lfm2"),
    ("hidden_size", "2048", "hidden_size is '2048', expected a whole number"),
    ("hidden_size", True, "hidden_size is True, expected a whole number"),
    ("hidden_size", None, "hidden_size is missing"),
    ("hidden_size", -32, "hidden_size is -32"),
    ("hidden_size", 0, "hidden_size is 0"),
    ("hidden_size", 32.5, "hidden_size is 32.5"),
    ("hidden_size", math.nan, "hidden_size is nan"),
    ("hidden_size", math.inf, "hidden_size is inf"),
    ("hidden_size", 10**40, "hidden_size is 1000000"),
    ("hidden_size", NESTED, r"hidden_size is \[\[\["),
    ("hidden_size", 33, "num_attention_heads is 4, expected a divisor of hidden_size 33"),
    ("vocab_size", {}, "vocab_size is {}"),
    ("vocab_size", 10**400, "vocab_size is 1000000"),
    ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000"),
    ("num_hidden_layers", 5, "layer_types is .*expected 5 entries"),
    ("num_attention_heads", "4", "num_attention_heads is '4'"),
    ("num_key_value_heads", 3, "num_key_value_heads is 3, expected a divisor of num_attention_heads 4"),
    ("num_key_value_heads", 0, "num_key_value_heads is 0"),
    ("head_dim", 7, "head_dim is 7, expected an even number"),
    ("head_dim", "8", "head_dim is '8'"),
    ("intermediate_size", None, "intermediate_size|block_ff_dim"),
    ("intermediate_size", -1, "intermediate_size is -1"),
    ("layer_types", ["conv", "attention", "conv", "conv"], "layer_types is .*each 'conv' or 'full_attention'"),
    ("layer_types", "conv", "layer_types is 'conv'"),
    ("layer_types", [[], {}, None, 1], "layer_types is"),
    ("full_attn_idxs", [0], r"full_attn_idxs is \[0\], but layer_types has attention at \[1, 3\]"),
    ("full_attn_idxs", [9], r"full_attn_idxs is \[9\], expected a list of layer indices from 0 to 3"),
    ("full_attn_idxs", [True], r"full_attn_idxs is \[True\]"),
    ("full_attn_idxs", 3, "full_attn_idxs is 3"),
    ("conv_L_cache", 1, "conv_L_cache is 1, expected a whole number"),
    ("conv_bias", "false", "conv_bias is 'false', expected true or false"),
    ("conv_bias", 0, "conv_bias is 0, expected true or false"),
    ("conv_dim", 64, "conv_dim is 64, expected hidden_size 32"),
    ("norm_eps", 0, "norm_eps is 0, expected a number above 0"),
    ("norm_eps", math.nan, "norm_eps is nan, expected a number above 0"),
    ("norm_eps", math.inf, "norm_eps is inf"),
    ("norm_eps", 10**400, "norm_eps is 1000000"),
    ("norm_eps", "1e-5", "norm_eps is '1e-5'"),
    ("norm_eps", True, "norm_eps is True"),
    ("max_position_embeddings", -5, "max_position_embeddings is -5"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'"),
    ("rope_parameters", 5, "rope_parameters is 5, expected an object"),
    ("rope_parameters", [], r"rope_parameters is \[\], expected an object"),
    ("rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn', expected 'default'"),
    ("rope_parameters", {"rope_theta": -1.0}, "rope_parameters.rope_theta is -1.0, expected a number above 0"),
    ("rope_parameters", {"rope_theta": "1e6"}, "rope_parameters.rope_theta is '1e6'"),
    ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
    ("bos_token_id", 97, "bos_token_id is 97, expected less than vocab_size 97"),
    ("bos_token_id", "1", "bos_token_id is '1'"),
    ("eos_token_id", [7, 97], "eos_token_id is 97, expected less than vocab_size 97"),
    ("eos_token_id", ["7"], r"eos_token_id is \['7'\], expected a token id or a list"),
    ("eos_token_id", True, "eos_token_id is True"),
    ("eos_token_id", {}, "eos_token_id is {}"),
    ("pad_token_id", 1.5, "pad_token_id is 1.5"),
    ("dtype", 16, "dtype is 16, expected a name such as 'bfloat16'"),
    ("quantization", 4, "quantization is 4, expected an object"),
    ("quantization", {"bits": 4}, "expected MLX quantisation"),
    ("quantization", {"bits": 7, "group_size": 64}, "bits is 7, expected one of"),
    ("quantization", {"bits": 4, "group_size": 48}, "group_size is 48, expected one of"),
    ("quantization", {"bits": 4, "group_size": 64, "mode": "nf4"}, "mode is 'nf4', expected one of affine"),
    ("quantization", {"bits": 4, "group_size": 64, "mode": ["affine"]}, r"mode is \['affine'\], expected one of"),
    ("quantization", {"bits": 4, "group_size": 64, "mode": "mxfp4"}, "group_size is 64, expected one of .32,."),
    ("quantization", {"bits": "4", "group_size": 64}, "bits is '4'"),
    (
        "quantization",
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 9}},
        "quantization.lm_head: group_size is missing",
    ),
    ("quantization_config", {"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq', expected MLX"),
]

REFUSED_EXPERTS = [
    ("layer_types", None, "layer_types is missing, expected a list of 'conv' and 'full_attention'"),
    ("num_experts", 0, "num_experts is 0"),
    ("num_experts", None, "num_experts is missing"),
    ("num_experts", 10**9, "num_experts is 1000000000"),
    ("num_experts_per_tok", 9, "num_experts_per_tok is 9, expected at most num_experts 8"),
    ("num_experts_per_tok", "3", "num_experts_per_tok is '3'"),
    ("moe_intermediate_size", None, "moe_intermediate_size is missing"),
    ("num_dense_layers", -1, "num_dense_layers is -1"),
    ("use_expert_bias", 1, "use_expert_bias is 1, expected true or false"),
    ("norm_topk_prob", "true", "norm_topk_prob is 'true'"),
    ("routed_scaling_factor", 0, "routed_scaling_factor is 0, expected a number above 0"),
    ("routed_scaling_factor", math.nan, "routed_scaling_factor is nan"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_refused_with_key_value_and_expectation(key, value, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(tiny_dense_config(**{key: value}))


@pytest.mark.parametrize(("key", "value", "message"), REFUSED_EXPERTS, ids=lambda value: str(value)[:30])
def test_a_wrong_value_of_a_mixture_of_experts_is_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"block_ffn_dim_multiplier": 1e300},
        {"block_ffn_dim_multiplier": 1e-9},
        {"block_ffn_dim_multiplier": None, "intermediate_size": 1},
    ],
    ids=str,
)
def test_a_feed_forward_width_that_the_rule_makes_impossible_is_refused(changes):
    with pytest.raises(ConfigError, match=r"block_ffn_dim_multiplier|intermediate_size is 1"):
        ModelConfig.from_dict(tiny_dense_config(block_auto_adjust_ff_dim=True, **changes))


def test_a_layer_count_without_layer_types_is_refused_before_a_list_of_that_length_is_made():
    raw = tiny_dense_config(num_hidden_layers=10**12)
    del raw["layer_types"]
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000000"):
        ModelConfig.from_dict(raw)
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000000"):
        ModelConfig.from_dict(raw | {"full_attn_idxs": [1]})


def test_the_quantization_block_is_read_with_its_exceptions():
    block = {
        "group_size": 64,
        "bits": 4,
        "model.layers.1.feed_forward.gate": {"group_size": 64, "bits": 8},
        "model.layers.0.conv.in_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.embed_tokens": False,
        "quant_method": "mlx",
    }
    found = ModelConfig.from_dict(tiny_config(quantization=block)).quantization
    assert found is not None
    assert found.of("model.layers.0.conv.out_proj") == Quantization(group_size=64, bits=4)
    assert found.of("model.layers.1.feed_forward.gate") == Quantization(group_size=64, bits=8)
    assert found.of("model.layers.0.conv.in_proj") == Quantization(group_size=32, bits=4, mode="mxfp4")
    assert found.of("model.embed_tokens") is None
    assert found == ModelConfig.from_dict(tiny_config(quantization_config=block)).quantization


# Files.


def test_a_config_is_read_from_its_folder_or_its_path(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == ModelConfig.from_dict(tiny_config())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b'{"model_type": "\xff"}', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a":' * 100_000, "cannot be read as JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType, expected a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "cannot be read as JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_not_a_json_object_is_refused_by_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_config_is_refused_and_a_wrong_value_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"not found, expected the checkpoint's config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(vocab_size=-1)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config.json: vocab_size is -1"):
        read_config(tmp_path)


# Anything at all.

KEYS = sorted(
    {
        *tiny_config(),
        *(key for old, _, _ in EQUIVALENT.values() for key in old),
        *(
            "head_dim",
            "conv_dim",
            "block_multiple_of",
            "block_ffn_dim_multiplier",
            "num_layers",
            "rope_scaling",
            "quantization",
            "quantization_config",
            "text_config",
        ),
    }
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30), 10**400, 1e308, 1e-320]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["bits", "group_size", "mode", "rope_theta", "rope_type"])),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sampled_from([tiny_config(), tiny_dense_config(), tiny_dense_config(block_auto_adjust_ff_dim=True)]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=3),
    dropped=st.sets(st.sampled_from(KEYS), max_size=2),
)
def test_any_json_in_any_key_is_accepted_or_refused_with_a_config_error(base, changes, dropped):
    raw = {key: value for key, value in {**base, **changes}.items() if key not in dropped}
    try:
        config = ModelConfig.from_dict(raw)
    except ConfigError:
        return
    assert all(size >= 1 for shape in expected_tensors(config).values() for size in shape)
