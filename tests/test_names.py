"""The table of tensor names: every spelling leads to the tensors that the model expects, and to nothing else."""

from __future__ import annotations

import pytest
from random_models import tiny_config, tiny_dense_config

from lfm_mlx.config import ModelConfig
from lfm_mlx.names import Part, expected_tensors, is_matrix, is_router, layer_of, parts_of

MOE = ModelConfig.from_dict(tiny_config())
DENSE = ModelConfig.from_dict(tiny_dense_config())
LAYER = "model.layers.2.feed_forward"


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_our_own_names_stay_as_they_are(config):
    for name in expected_tensors(config):
        assert parts_of(name, config) == (Part(target=name, is_taps=name.endswith(".conv.conv.weight")),)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (f"{LAYER}.experts.5.w1.weight", (Part(target=f"{LAYER}.switch_mlp.gate_proj.weight", expert=5),)),
        (f"{LAYER}.experts.5.w3.weight", (Part(target=f"{LAYER}.switch_mlp.up_proj.weight", expert=5),)),
        (f"{LAYER}.experts.0.w2.weight", (Part(target=f"{LAYER}.switch_mlp.down_proj.weight", expert=0),)),
        (f"{LAYER}.experts.down_proj", (Part(target=f"{LAYER}.switch_mlp.down_proj.weight"),)),
        (
            f"{LAYER}.experts.gate_up_proj",
            (
                Part(target=f"{LAYER}.switch_mlp.gate_proj.weight", rows=0),
                Part(target=f"{LAYER}.switch_mlp.up_proj.weight", rows=1),
            ),
        ),
        ("model.layers.0.feed_forward.w1.weight", (Part(target="model.layers.0.feed_forward.gate_proj.weight"),)),
        ("model.layers.0.feed_forward.w3.weight", (Part(target="model.layers.0.feed_forward.up_proj.weight"),)),
        ("model.layers.0.feed_forward.w2.weight", (Part(target="model.layers.0.feed_forward.down_proj.weight"),)),
        ("lm_head.weight", ()),
        ("somewhere.else", (Part(target="somewhere.else"),)),
        (f"{LAYER}.experts.{'9' * 5000}.w1.weight", (Part(target=f"{LAYER}.experts.{'9' * 5000}.w1.weight"),)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hugging_face_name_leads_to_ours(name, parts):
    assert parts_of(name, MOE) == parts


def test_the_fused_spelling_may_end_in_weight():
    for name in (f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"):
        assert parts_of(f"{name}.weight", MOE) == parts_of(name, MOE)


def test_dense_models_keep_w1_w2_w3():
    for matrix in ("w1", "w2", "w3"):
        name = f"{LAYER}.{matrix}.weight"
        assert parts_of(name, DENSE) == (Part(target=name),)
        assert name in expected_tensors(DENSE)


def test_an_untied_head_is_kept_and_a_tied_one_dropped():
    untied = ModelConfig.from_dict(tiny_config(tie_word_embeddings=False))
    assert parts_of("lm_head.weight", untied) == (Part(target="lm_head.weight"),)
    assert "lm_head.weight" in expected_tensors(untied)
    assert "lm_head.weight" not in expected_tensors(MOE)


def test_layer_of_reads_the_index_and_nothing_from_other_names():
    assert layer_of("model.layers.17.conv.in_proj.weight") == 17
    assert layer_of("model.embed_tokens.weight") is None
    assert layer_of("model.layers.x.conv.in_proj.weight") is None


def test_matrices_are_what_mlx_lm_quantises():
    config = ModelConfig.from_dict(tiny_config(conv_bias=True))
    plain = {name for name in expected_tensors(config) if not is_matrix(name)}
    kinds = ("norm.weight", ".conv.conv.weight", ".bias", "expert_bias")
    assert plain == {name for name in expected_tensors(config) if name.endswith(kinds)}


def test_only_the_gate_of_a_mixture_of_experts_is_a_router():
    routers = [name for name in expected_tensors(MOE) if is_router(name)]
    assert routers == [f"model.layers.{i}.feed_forward.gate.weight" for i in (1, 2, 3)]
    assert is_router("model.layers.1.feed_forward.gate")
    assert not is_router("model.layers.0.feed_forward.gate_proj.weight")


@pytest.mark.parametrize(
    ("changes", "name", "shape"),
    [
        ({}, "model.layers.1.self_attn.q_proj.weight", (32, 32)),
        ({}, "model.layers.1.self_attn.k_proj.weight", (16, 32)),
        ({"head_dim": 12}, "model.layers.1.self_attn.q_proj.weight", (48, 32)),
        ({"head_dim": 12}, "model.layers.1.self_attn.out_proj.weight", (32, 48)),
        ({"head_dim": 12}, "model.layers.1.self_attn.k_layernorm.weight", (12,)),
        ({}, "model.layers.0.conv.conv.weight", (32, 3, 1)),
        ({"conv_L_cache": 4}, "model.layers.0.conv.conv.weight", (32, 4, 1)),
        ({"conv_bias": True}, "model.layers.0.conv.in_proj.bias", (96,)),
        ({}, "model.layers.0.feed_forward.gate_proj.weight", (48, 32)),
        ({}, "model.layers.1.feed_forward.switch_mlp.down_proj.weight", (8, 32, 24)),
        ({}, "model.layers.1.feed_forward.expert_bias", (8,)),
    ],
    ids=str,
)
def test_a_tensor_has_the_shape_that_the_config_implies(changes, name, shape):
    assert expected_tensors(ModelConfig.from_dict(tiny_config(**changes)))[name] == shape


def test_options_that_are_off_leave_their_tensors_out():
    config = ModelConfig.from_dict(tiny_config(use_expert_bias=False))
    names = expected_tensors(config)
    assert not any(name.endswith((".bias", "expert_bias")) for name in names)
