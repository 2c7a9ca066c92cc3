"""GGUF files that the gguf package wrote with llama.cpp's names."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.convert import convert
from lfm_mlx.errors import CheckpointError, ConversionError
from lfm_mlx.load import load

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

TINY = Path(__file__).parents[2] / "examples" / "tiny"
NAMES = {
    "operator_norm": "attn_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "feed_forward.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def gguf_tensors(folder):
    """Our own reading of Hugging Face's names, as llama.cpp's converter renames them."""
    stored = {}
    for file in folder.glob("model*.safetensors"):
        stored |= mx.load(str(file))
    experts, renamed = {}, {}
    for name, array in stored.items():
        values = np.array(array.astype(mx.float32))
        parts = name.split(".")
        if name == "model.embed_tokens.weight":
            renamed["token_embd.weight"] = values
        elif name == "model.embedding_norm.weight":
            renamed["token_embd_norm.weight"] = values
        elif ".experts." in name:
            experts.setdefault((parts[2], parts[6]), {})[int(parts[5])] = values
        elif name.endswith("expert_bias"):
            renamed[f"blk.{parts[2]}.exp_probs_b.bias"] = values
        elif name.endswith("ffn_norm.weight"):
            renamed[f"blk.{parts[2]}.ffn_norm.weight"] = values
        else:
            inner = ".".join(parts[3:-1])
            renamed[f"blk.{parts[2]}.{NAMES[inner]}.weight"] = values.squeeze(1) if inner == "conv.conv" else values
    for (layer, matrix), by_expert in experts.items():
        renamed[f"blk.{layer}.{EXPERTS[matrix]}.weight"] = np.stack([by_expert[e] for e in sorted(by_expert)])
    return renamed


def write_gguf(folder, file, kind, *, with_tokenizer=False):
    """Write the checkpoint in `folder` as llama.cpp's converter does, matrices as `kind`."""
    config = json.loads((folder / "config.json").read_text())
    is_moe = config["model_type"] == "lfm2_moe"
    writer = gguf.GGUFWriter(file, "lfm2moe" if is_moe else "lfm2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_head_count(config["num_attention_heads"])
    kinds = config.get("layer_types") or [
        "full_attention" if i in config["full_attn_idxs"] else "conv" for i in range(config["num_hidden_layers"])
    ]
    writer.add_head_count_kv([config["num_key_value_heads"] if kind_ == "full_attention" else 0 for kind_ in kinds])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    tensors = gguf_tensors(folder)
    if is_moe:
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
    else:
        writer.add_feed_forward_length(tensors["blk.0.ffn_gate.weight"].shape[0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(0)
    if with_tokenizer:
        add_tokenizer(writer, folder)
    for name, values in tensors.items():
        is_plain = values.ndim == 1 or "shortconv.conv" in name or "ffn_gate_inp" in name
        add_tensor(writer, name, values, "F32" if is_plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tensor(writer, name, values, kind):
    quantized = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, values.astype(np.float16 if kind == "F16" else np.float32))
        return
    if kind in ("BF16", "Q8_0", "Q4_0"):
        writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
        return
    writer.add_tensor(name, random_blocks(values.shape, quantized), raw_dtype=quantized)


def random_blocks(shape, quantized):
    """K-quants, which the package can read and not write: random bits with moderate scales."""
    block, size = gguf.GGML_QUANT_SIZES[quantized]
    blocks = np.random.default_rng(0).integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    if quantized == gguf.GGMLQuantizationType.Q6_K:
        blocks[:, -2:] = scale
    else:
        blocks[:, :4] = np.tile(scale, 2)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def add_tokenizer(writer, folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"]: token for token in raw["added_tokens"]}
    vocab = {**raw["model"]["vocab"], **{token["content"]: i for i, token in special.items()}}
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if special[i]["special"] else 4 if i in special else 1 for i in [0]]
    kinds = [(3 if special[i]["special"] else 4) if i in special else 1 for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in raw["model"]["merges"]])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def tensors_of(folder):
    return mx.load(str(folder / "model.safetensors"))


def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    return ids


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """The trained checkpoint as GGUF in Q8_0."""
    return write_gguf(TINY, tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf", "Q8_0", with_tokenizer=True)


def test_a_gguf_of_the_trained_checkpoint_says_what_its_source_says(tiny_gguf, tmp_path):
    result = convert(tiny_gguf, tmp_path / "out", recipe="unquantized")
    assert "holds Q8_0" in result.notes[0]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ours, our_tokenizer = load(tmp_path / "out")
    source, tokenizer = load(TINY)
    prompt = tokenizer.apply_template(messages)
    assert our_tokenizer.apply_template(messages) == prompt
    assert our_tokenizer.eos_id == tokenizer.eos_id
    assert greedy(ours, prompt, 12) == greedy(source, prompt, 12)


def test_text_becomes_the_same_ids_with_a_tokenizer_from_gguf(tiny_gguf, tmp_path):
    from lfm_mlx.tokenizer import load_tokenizer

    convert(tiny_gguf, tmp_path / "out")
    ours, original = load_tokenizer(tmp_path / "out"), load_tokenizer(TINY)
    for text in ("Tell Bob that I'm late, 12345 times!\n\n  Grüße, 東京", "<|im_start|>user\nx<|im_end|>"):
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_values_that_are_not_quantised_arrive_as_they_were(kind, sources, tmp_path, request):
    for name in ("moe", "dense_old", "dense_new"):
        file = write_gguf(sources[name], tmp_path / f"{name}.gguf", kind)
        made = tensors_of(convert(file, tmp_path / f"{name}-gguf", recipe="unquantized").folder)
        expected = tensors_of(convert(sources[name], tmp_path / f"{name}-direct", recipe="unquantized").folder)
        assert made.keys() == expected.keys()
        atol = 0 if kind != "F16" else 1e-3
        for key, array in made.items():
            assert mx.allclose(array.astype(mx.float32), expected[key].astype(mx.float32), atol=atol, rtol=atol).item()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_become_the_values_that_the_gguf_package_reads(kind, make_weights, make_checkpoint, configs, tmp_path):
    config = configs["dense_new"] | {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 768}
    source = make_checkpoint(tmp_path / "source", config, make_weights(config, 512))
    file = write_gguf(source, tmp_path / "model.gguf", kind)
    made = tensors_of(convert(file, tmp_path / "out", recipe="unquantized", dtype="float32").folder)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for ours, theirs in (("conv.in_proj", "shortconv.in_proj"), ("feed_forward.w2", "ffn_down")):
        tensor = stored[f"blk.2.{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(np.array(made[f"model.layers.2.{ours}.weight"]), expected)
        assert np.abs(expected).max() > 0


def test_a_gguf_converts_to_a_checkpoint_that_passes_every_check(tiny_gguf, tmp_path):
    out = convert(tiny_gguf, tmp_path / "out", recipe="mixed", rounding="minmax").folder
    assert Checkpoint(out).config.num_experts == Checkpoint(TINY).config.num_experts
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["source"]) == [tiny_gguf.name]


def test_damaged_and_foreign_files_are_refused(tiny_gguf, sources, tmp_path):
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(ConversionError, match=r"architecture is 'llama', expected lfm2 or lfm2moe"):
        convert(tmp_path / "other.gguf", tmp_path / "out")
    cut = Path(shutil.copyfile(tiny_gguf, tmp_path / "cut.gguf"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()
