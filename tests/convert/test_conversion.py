import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.convert import attempt, convert, uniform_recipe, verify
from lfm_mlx.errors import CheckpointError, ConversionError, OptionError

RECIPES = {
    "4bit": {},
    "8bit": {"q_bits": 8},
    "3bit group 32": {"q_bits": 3, "q_group_size": 32},
    "6bit group 128": {"q_bits": 6, "q_group_size": 128},
    "mxfp4": {"q_mode": "mxfp4"},
    "nvfp4": {"q_mode": "nvfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
}
TOKENS = mx.array([[1, 5, 9, 77, 3, 2, 14]])


def recipe_of(options):
    return uniform_recipe(
        bits=options.get("q_bits"), group_size=options.get("q_group_size"), mode=options.get("q_mode", "affine")
    )


def tensors_of(folder):
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(file))
    return tensors


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


def mlx_lm_logits(folder):
    from mlx_lm.utils import load_model  # slow: transformers comes with it

    model, _ = load_model(folder)
    return model(TOKENS)


@pytest.fixture(scope="session")
def convert_with_mlx_lm(sources, tmp_path_factory):
    """mlx-lm's own conversion of a source; a new-style dense config is completed by hand, since mlx-lm needs it."""
    from mlx_lm import convert as reference  # slow: transformers comes with it

    def run(kind, *, quantize=True, **options):
        parent = tmp_path_factory.mktemp("mlx_lm")
        source = shutil.copytree(sources[kind], parent / "source")
        if kind == "dense_new":
            config = json.loads((source / "config.json").read_text())
            config |= {"block_dim": 64, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
            config |= {"block_auto_adjust_ff_dim": True}
            (source / "config.json").write_text(json.dumps(config))
        reference(str(source), str(parent / "out"), quantize=quantize, **options)
        return parent / "out"

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_tensors_and_quantization_block_equal_mlx_lms(kind, name, sources, convert_with_mlx_lm, tmp_path):
    theirs = convert_with_mlx_lm(kind, **RECIPES[name])
    ours = convert(sources[kind], tmp_path / "out", recipe=recipe_of(RECIPES[name])).folder
    expected, made = tensors_of(theirs), tensors_of(ours)
    assert made.keys() == expected.keys()
    assert [n for n in made if not identical(made[n], expected[n])] == []
    their_config, our_config = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    assert our_config["quantization"] == their_config["quantization"]
    assert our_config["quantization_config"] == their_config["quantization_config"]


def test_unquantised_tensors_equal_mlx_lms(kind, sources, convert_with_mlx_lm, tmp_path):
    expected = tensors_of(convert_with_mlx_lm(kind, quantize=False))
    made = tensors_of(convert(sources[kind], tmp_path / "out", recipe="unquantized").folder)
    assert made.keys() == expected.keys()
    assert [n for n in made if not identical(made[n], expected[n])] == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cast_tensors_equal_mlx_lms(sources, convert_with_mlx_lm, tmp_path, dtype):
    expected = tensors_of(convert_with_mlx_lm("moe", dtype=dtype))
    made = tensors_of(convert(sources["moe"], tmp_path / "out", dtype=dtype).folder)
    as_stored = tensors_of(convert(sources["moe"], tmp_path / "as_stored").folder)
    assert [n for n in made if not identical(made[n], expected[n])] == []
    assert [n for n in made if not identical(made[n], as_stored[n])] != []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_seeds_make_different_tensors(kind, make_weights, configs, ffn_sizes):
    """The control of the comparisons with mlx-lm: other weights do not compare equal."""
    first, second = (make_weights(configs[kind], ffn_sizes[kind], seed=seed) for seed in (0, 1))
    assert not any(identical(first[name], second[name]) for name in first)


def test_mlx_lm_loads_ours_and_computes_what_it_computes_with_its_own(kind, sources, convert_with_mlx_lm, tmp_path):
    ours = convert(sources[kind], tmp_path / "ours", shard_bytes=30_000).folder
    other = convert(sources[kind], tmp_path / "other", recipe="8bit").folder
    logits = mlx_lm_logits(convert_with_mlx_lm(kind))
    assert mx.array_equal(mlx_lm_logits(ours), logits).item()
    assert not mx.array_equal(mlx_lm_logits(other), logits).item()


def test_mlx_lms_conversions_pass_our_verification(kind, convert_with_mlx_lm):
    checkpoint = verify(convert_with_mlx_lm(kind, q_mode="mxfp4"))
    assert checkpoint.quantization_of("model.embed_tokens.weight").mode == "mxfp4"


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 10**9])
def test_shard_size_changes_files_but_no_tensor(sources, tmp_path, shard_bytes):
    result = convert(sources["moe"], tmp_path / "out", shard_bytes=shard_bytes)
    plain = tensors_of(convert(sources["moe"], tmp_path / "plain").folder)
    made = tensors_of(result.folder)
    assert result.num_shards == len(list(result.folder.glob("*.safetensors")))
    assert (result.num_shards == 1) == (shard_bytes == 10**9)
    assert made.keys() == plain.keys()
    assert all(identical(made[name], plain[name]) for name in made)


def test_result_counts_what_is_on_the_disk(sources, tmp_path):
    result = convert(sources["moe"], tmp_path / "out", shard_bytes=50_000)
    made = tensors_of(result.folder)
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    assert result.num_bytes == sum(array.nbytes for array in made.values()) == index["metadata"]["total_size"]
    assert result.source_bytes == Checkpoint(sources["moe"]).num_bytes
    assert result.bits_per_weight == 8 * result.num_bytes / result.num_parameters
    assert 4.5 < result.bits_per_weight < 5.0
    assert result.notes == ()


def test_tokenizer_template_and_licence_are_beside_the_weights(sources, tmp_path):
    out = convert(sources["moe"], tmp_path / "out").folder
    weights = {"model.safetensors", "model.safetensors.index.json", "config.json", "manifest.json", "README.md"}
    copied = {path.name for path in out.iterdir()} - weights
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    assert copied == expected
    assert all((out / name).read_bytes() == (sources["moe"] / name).read_bytes() for name in expected)


def fuse_experts(weights, config):
    """Rename to the layout that transformers 5 has in memory: one tensor for gate and up of all experts."""
    fused = {name: array for name, array in weights.items() if ".experts." not in name}
    experts = range(config["num_experts"])
    for layer in range(config["num_dense_layers"], config["num_hidden_layers"]):
        path = f"model.layers.{layer}.feed_forward.experts"
        w1, w2, w3 = (mx.stack([weights[f"{path}.{e}.{name}.weight"] for e in experts]) for name in ("w1", "w2", "w3"))
        fused |= {f"{path}.gate_up_proj": mx.concatenate([w1, w3], axis=1), f"{path}.down_proj": w2}
    return fused


def test_fused_experts_convert_to_the_same_tensors(make_weights, make_checkpoint, configs, sources, tmp_path):
    fused = fuse_experts(make_weights(configs["moe"], 128), configs["moe"])
    source = make_checkpoint(tmp_path / "fused", configs["moe"], fused)
    made = tensors_of(convert(source, tmp_path / "out").folder)
    expected = tensors_of(convert(sources["moe"], tmp_path / "expected").folder)
    assert made.keys() == expected.keys()
    assert all(identical(made[name], expected[name]) for name in made)
    gate, up = (f"model.layers.1.feed_forward.switch_mlp.{half}_proj.weight" for half in ("gate", "up"))
    assert not identical(made[gate], expected[up])


def test_expert_bias_stored_in_bfloat16_is_written_in_float32(make_weights, make_checkpoint, configs, tmp_path):
    weights = make_weights(configs["moe"], 128)
    name = "model.layers.2.feed_forward.expert_bias"
    stored = weights[name] = weights[name].astype(mx.bfloat16)
    source = make_checkpoint(tmp_path / "source", configs["moe"], weights)
    made = tensors_of(convert(source, tmp_path / "out").folder)
    assert identical(made[name], stored.astype(mx.float32))


def test_a_conversion_without_quantisation_converts_like_its_source(sources, tmp_path):
    plain = convert(sources["moe"], tmp_path / "plain", recipe="unquantized").folder
    again = tensors_of(convert(plain, tmp_path / "again").folder)
    direct = tensors_of(convert(sources["moe"], tmp_path / "direct").folder)
    assert again.keys() == direct.keys()
    assert all(identical(again[name], direct[name]) for name in again)


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_transformers_and_a_full_precision_conversion_agree(model, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the oracle extra")
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    shared |= {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention", "conv"]}
    torch.manual_seed(0)
    if model == "moe":
        config = transformers.Lfm2MoeConfig(
            **shared, intermediate_size=128, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
        )
        config.num_dense_layers = 1
        oracle = transformers.Lfm2MoeForCausalLM(config)
    else:
        oracle = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**shared, intermediate_size=384))
    for parameter in oracle.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    oracle.eval().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    out = convert(tmp_path / "source", tmp_path / "out", recipe="unquantized").folder
    with torch.no_grad():
        expected = oracle(torch.tensor(TOKENS.tolist())).logits.numpy()
    logits = np.array(mlx_lm_logits(out))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits[:, 1:] - expected[:, :-1]).max() > 0.1


def test_progress_that_raises_ends_the_conversion_and_can_be_gone_on_with(sources, tmp_path):
    def interrupt(done_bytes, total_bytes):
        if done_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sources["moe"], tmp_path / "out", progress=interrupt, task_bytes=20_000)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.partial-")
    assert "config.json" not in os.listdir(tmp_path / left)
    result = convert(sources["moe"], tmp_path / "out", resume=True, task_bytes=20_000)
    assert 0 < result.num_resumed_tasks < result.num_tasks
    whole = convert(sources["moe"], tmp_path / "whole").folder
    assert contents_of(result.folder) == contents_of(whole)


def test_failed_replacement_keeps_the_old_folder(sources, tmp_path, monkeypatch):
    out = convert(sources["moe"], tmp_path / "out").folder
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(folder, planned):
        raise CheckpointError("made up")

    monkeypatch.setattr(attempt, "verify", fail)
    with pytest.raises(CheckpointError, match="made up"):
        convert(sources["moe"], out, recipe="8bit", force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_and_its_absence_refuses(sources, tmp_path):
    out = convert(sources["moe"], tmp_path / "out", shard_bytes=50_000).folder
    with pytest.raises(ConversionError, match="exists already"):
        convert(sources["moe"], out, recipe="8bit")
    assert verify(out).config.quantization.default.bits == 4
    convert(sources["moe"], out, recipe="8bit", force=True)
    assert verify(out).config.quantization.default.bits == 8
    assert len(list(out.glob("*.safetensors"))) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_progress_counts_every_source_byte_once(sources, tmp_path):
    calls = []
    result = convert(sources["moe"], tmp_path / "out", task_bytes=20_000, progress=lambda *counts: calls.append(counts))
    done = [done_bytes for done_bytes, _ in calls]
    assert done[0] == 0
    assert done == sorted(done)
    assert calls[-1] == (result.source_bytes, result.source_bytes)
    assert len(calls) == 1 + result.num_tasks


def test_peak_memory_is_less_than_a_layer(make_weights, make_checkpoint, configs, tmp_path):
    layers = 12
    config = configs["dense_new"] | {"hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": layers}
    config |= {"layer_types": ["conv", "full_attention"] * (layers // 2), "dtype": "float32"}
    source = make_checkpoint(tmp_path / "source", config, make_weights(config, 1024, mx.float32), num_shards=2)
    layer_bytes = Checkpoint(source).num_bytes // layers
    assert layer_bytes > 3_000_000

    def peak_bytes(work):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        work()
        return mx.get_peak_memory() - before

    checkpoint = Checkpoint(source)
    assert peak_bytes(lambda: convert(source, tmp_path / "out")) < layer_bytes
    assert peak_bytes(lambda: mx.eval([checkpoint.tensor(name) for name in checkpoint.names])) > 10 * layer_bytes


def test_quantised_source_is_refused_unless_asked_for(sources, tmp_path):
    quantised = convert(sources["moe"], tmp_path / "8bit", recipe="8bit").folder
    with pytest.raises(ConversionError, match=r"quantised already \(8 bits, affine\).*--requantize"):
        convert(quantised, tmp_path / "out")
    assert os.listdir(tmp_path) == ["8bit"]
    made = tensors_of(convert(quantised, tmp_path / "out", requantize=True).folder)
    eight = tensors_of(quantised)
    path = "model.layers.2.feed_forward.switch_mlp.up_proj"
    restored = mx.dequantize(*(eight[f"{path}.{part}"] for part in ("weight", "scales", "biases")), 64, 8)
    expected = mx.quantize(restored, 64, 4)
    parts = [made[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
    assert all(identical(a, b) for a, b in zip(parts, expected, strict=True))


def test_dequantised_is_what_mlx_dequantises(sources, tmp_path):
    packed = convert(sources["moe"], tmp_path / "4bit", recipe="4bit").folder
    plain = convert(packed, tmp_path / "plain", recipe="unquantized", requantize=True).folder
    config = json.loads((plain / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
    four, made = tensors_of(packed), tensors_of(plain)
    path = "model.layers.1.feed_forward.switch_mlp.down_proj"
    expected = mx.dequantize(*(four[f"{path}.{part}"] for part in ("weight", "scales", "biases")), 64, 4)
    assert identical(made[f"{path}.weight"], expected)
    assert mlx_lm_logits(plain).shape == mlx_lm_logits(packed).shape


def test_a_template_without_tools_is_told(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (note,) = convert(source, tmp_path / "out").notes
    assert "template does not show tools" in note


def test_missing_tokenizer_is_a_note_and_no_error(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (note,) = convert(source, tmp_path / "out").notes
    assert "has no tokenizer.json" in note


def test_damaged_source_is_refused_before_anything_is_written(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    shard = min(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_values_beyond_float16_stop_the_conversion(make_weights, make_checkpoint, configs, tmp_path):
    weights = make_weights(configs["dense_old"], 128)
    name = "model.layers.2.feed_forward.w2.weight"
    weights[name] = weights[name] * 1e6
    source = make_checkpoint(tmp_path / "source", configs["dense_old"], weights)
    with pytest.raises(ConversionError, match=f"{name}: holds values that float16 cannot"):
        convert(source, tmp_path / "out", dtype="float16")
    assert os.listdir(tmp_path) == ["source"]
    convert(source, tmp_path / "out")


def test_group_size_that_fits_no_matrix_is_refused(make_weights, make_checkpoint, configs, tmp_path):
    config = configs["dense_old"] | {"block_ff_dim": 96}
    source = make_checkpoint(tmp_path / "source", config, make_weights(config, 64))
    with pytest.raises(ConversionError, match="no matrix has rows that divide into groups of 128"):
        convert(source, tmp_path / "out", recipe=uniform_recipe(group_size=128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "5bits"}, "recipe is '5bits'"),
        ({"dtype": "bf16"}, "dtype is 'bf16', expected one of bfloat16, float16, float32"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"task_bytes": 0}, "task_bytes is 0"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_wrong_options_are_refused_by_name(sources, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        convert(sources["moe"], tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_unwritable_destination_is_one_conversion_error(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file, expected a folder"):
        convert(sources["moe"], tmp_path / "file" / "out")
    with pytest.raises(ConversionError, match="no such folder"):
        convert(tmp_path / "absent", tmp_path / "out")
