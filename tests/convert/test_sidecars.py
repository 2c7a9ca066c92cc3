import dataclasses
import json

import pytest

from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.convert.sidecars import config_json, copy_sidecars, find_sidecars

FOUR = Quantization(bits=4, group_size=64)


def variants(configs):
    moe, old, new = configs["moe"], configs["dense_old"], configs["dense_new"]
    yield from configs.values()
    yield {**moe, "rope_theta": None, "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}
    yield {key: value for key, value in moe.items() if key not in ("norm_topk_prob", "use_expert_bias", "norm_eps")}
    yield {**moe, "layer_types": None, "full_attn_idxs": [1, 3]}
    yield {**old, "block_auto_adjust_ff_dim": False}
    yield {**old, "block_ffn_dim_multiplier": None}
    yield {**old, "block_ffn_dim_multiplier": 1.5}
    yield {**new, "block_auto_adjust_ff_dim": False}
    yield {**new, "rope_parameters": None, "theta": 5e5}
    yield {**new, "rope_parameters": {"rope_type": "default"}}


def meaning(raw):
    return dataclasses.replace(ModelConfig.from_dict(raw), quantization=None)


def test_written_config_means_the_same_as_the_source(configs):
    for raw in variants(configs):
        config = ModelConfig.from_dict(raw)
        written = config_json(config, FOUR, {}, None)
        assert meaning(written) == meaning(raw)
        assert meaning({**written, "norm_eps": 0.5}) != meaning(raw)


def test_every_key_that_the_source_gives_a_value_keeps_it(configs):
    for raw in variants(configs):
        written = config_json(ModelConfig.from_dict(raw), FOUR, {}, None)
        assert {key: written[key] for key, value in raw.items() if value is not None} == {
            key: value for key, value in raw.items() if value is not None
        }
        assert list(written) == sorted(written)


def test_mlx_lm_reads_the_same_sizes(configs):
    from mlx_lm.models import lfm2, lfm2_moe  # slow: transformers comes with it

    for raw in variants(configs):
        config = ModelConfig.from_dict(raw)
        module = lfm2_moe if config.is_moe else lfm2
        args = module.ModelArgs.from_dict(config_json(config, FOUR, {}, None))
        model = module.Model(args)
        width = len(model.layers[0].feed_forward[("gate_proj" if config.is_moe else "w1")].weight)
        assert width == config.ffn_size
        assert args.rope_theta == config.rope_theta
        assert tuple(args.full_attn_idxs) == config.attention_layers
        assert args.norm_eps == config.norm_eps


def test_transformers_reads_the_same_sizes(configs):
    from transformers import Lfm2Config, Lfm2MoeConfig  # slow

    for raw in configs.values():
        kind = Lfm2MoeConfig if raw["model_type"] == "lfm2_moe" else Lfm2Config
        written = config_json(ModelConfig.from_dict(raw), FOUR, {}, None)
        before, after = (kind.from_dict(dict(each)).to_dict() for each in (raw, written))
        added = {"quantization", "quantization_config", "block_dim", "layer_types", "full_attn_idxs"}
        assert {key: after[key] for key in before.keys() - added} == {key: before[key] for key in before.keys() - added}
        assert after["layer_types"] == before["layer_types"]


def test_mlx_lm_refuses_the_new_config_that_was_not_completed(configs):
    from mlx_lm.models import lfm2  # slow: transformers comes with it

    with pytest.raises(TypeError, match="block_dim"):
        lfm2.ModelArgs.from_dict(configs["dense_new"])


def test_quantization_block_is_written_twice_and_read_back(configs):
    config = ModelConfig.from_dict(configs["moe"])
    overrides = {
        "model.layers.1.feed_forward.gate": Quantization(bits=8, group_size=64),
        "model.embed_tokens": Quantization(bits=4, group_size=32, mode="mxfp4"),
    }
    written = config_json(config, FOUR, overrides, None)
    assert written["quantization"] == written["quantization_config"]
    assert written["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.1.feed_forward.gate": {"group_size": 64, "bits": 8},
        "model.embed_tokens": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    }
    read = ModelConfig.from_dict(json.loads(json.dumps(written))).quantization
    assert read.default == FOUR
    assert read.overrides == overrides


def test_an_affine_exception_to_another_mode_is_read_back_as_affine(configs):
    config = ModelConfig.from_dict(configs["moe"])
    overrides = {"model.layers.1.feed_forward.gate": Quantization(bits=8, group_size=64)}
    written = config_json(config, Quantization(bits=4, group_size=32, mode="mxfp4"), overrides, None)
    assert ModelConfig.from_dict(written).quantization.overrides == overrides


def test_unquantised_config_has_no_quantization_block(configs):
    written = config_json(ModelConfig.from_dict(configs["moe"]), None, {}, None)
    assert not [key for key in written if "quantization" in key]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_changed_dtype_is_recorded_under_the_key_of_the_source(configs, key):
    raw = {name: value for name, value in configs["moe"].items() if name != "torch_dtype"}
    written = config_json(ModelConfig.from_dict({**raw, key: "bfloat16"}), None, {}, "float16")
    assert {name: value for name, value in written.items() if "dtype" in name} == {key: "float16"}


def test_tokenizer_template_and_licence_are_copied_and_weights_are_not(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    wanted = [
        "LICENSE",
        "LICENSE.md",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    unwanted = ["config.json", "model.safetensors", "pytorch_model.bin", "model.gguf", "onnx/model.onnx", "modeling.py"]
    for name in wanted + unwanted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_sidecars(source, out, find_sidecars(source))
    copied = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert copied == sorted(wanted)
    assert all((out / name).read_text() == name for name in wanted)


def test_links_of_the_hub_cache_are_copied_as_files(tmp_path):
    source, out = tmp_path / "snapshots" / "abc", tmp_path / "out"
    source.mkdir(parents=True)
    out.mkdir()
    (tmp_path / "blob").write_text("{}")
    (source / "tokenizer.json").symlink_to("../../blob")
    copy_sidecars(source, out, find_sidecars(source))
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_text() == "{}"
