from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from chat_checkpoints import VOCAB_SIZE, chat_config, write_chat_checkpoint, write_tokenizer
from mlx.utils import tree_flatten
from random_models import RandomWeights, random_tokens, relative_error, tiny_config, tiny_model, write_checkpoint

from lfm_mlx import load
from lfm_mlx.build import build_model
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.errors import CheckpointError, ConfigError, LfmError, OptionError
from lfm_mlx.load import LoadProgress, compute_dtype
from lfm_mlx.model import Model, SplitExpertLinear, SplitLinear
from lfm_mlx.types import SamplingParams

on_the_cpu = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="dtype rules of MLX's CPU backend")

FOUR_BITS = Quantization(group_size=32, bits=4)
EIGHT_BITS = Quantization(group_size=32, bits=8)
MB = 1_000_000


def write_hf_checkpoint(folder: Path, raw: dict[str, Any], seed: int = 0) -> Path:
    """The weights of `write_checkpoint` as Hugging Face spells them: w1, w2, w3, experts one by one, taps (D, 1, W)."""
    stored = {}
    for name, array in RandomWeights(ModelConfig.from_dict(raw), seed).tensors.items():
        for ours, theirs in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
            name = name.replace(f"feed_forward.{ours}", f"feed_forward.{theirs}")
            name = name.replace(f"switch_mlp.{ours}", f"experts.*.{theirs}")
        if "*" in name:
            stored |= {name.replace("*", str(expert)): matrix for expert, matrix in enumerate(array)}
        elif name.endswith(".conv.conv.weight"):
            stored[name] = array.transpose(0, 2, 1)
        else:
            stored[name] = array
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), stored, metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def dtypes_of(model: Model) -> set[mx.Dtype]:
    return {array.dtype for array in dict(tree_flatten(model.parameters())).values()}


def test_both_layouts_give_the_same_model(tmp_path: Path) -> None:
    ours, _ = load(write_chat_checkpoint(tmp_path / "mlx"))
    theirs, tokenizer = load(write_hf_checkpoint(tmp_path / "hf", chat_config()))
    other, _ = load(write_hf_checkpoint(tmp_path / "other", chat_config(), seed=1))
    tokens = random_tokens(2, 40, vocab_size=VOCAB_SIZE)
    logits = ours(tokens)
    assert logits.shape == (2, 40, VOCAB_SIZE)
    assert mx.array_equal(theirs(tokens), logits)
    assert relative_error(other(tokens), logits) > 0.1
    assert tokenizer.decode(tokenizer.encode("Hello", add_bos=False)) == "Hello"


def test_a_path_and_a_string_name_the_same_folder(tmp_path: Path) -> None:
    folder = write_chat_checkpoint(tmp_path / "outer" / "4bit")
    tokens = random_tokens(1, 5)
    first = load(folder).model(tokens)
    assert mx.array_equal(load(str(folder)).model(tokens), first)
    assert mx.array_equal(load(folder.parent, subfolder="4bit").model(tokens), first)


@on_the_cpu
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_the_cpu_computes_in_float32_whatever_is_stored(tmp_path: Path, stored: str) -> None:
    folder = write_chat_checkpoint(tmp_path, chat_config(dtype=stored))
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: array.astype(getattr(mx, stored)) for name, array in tensors.items()}
    )
    model, _ = load(folder)
    assert (model.dtype, dtypes_of(model)) == (mx.float32, {mx.float32})
    assert model(random_tokens(1, 5)).dtype == mx.float32


@on_the_cpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_unquantised_experts_in_16_bits_are_refused_on_the_cpu_with_the_reason(tmp_path: Path, dtype: str) -> None:
    folder = write_chat_checkpoint(tmp_path)
    with pytest.raises(OptionError, match="CPU backend runs an unquantised mixture of experts in float32 only"):
        load(folder, dtype=dtype)
    assert load(folder, dtype="float32").model.dtype == mx.float32


@on_the_cpu
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_dtype_that_the_device_can_compute_in_is_honoured(tmp_path: Path, name: str) -> None:
    dtype = getattr(mx, name)
    dense = write_chat_checkpoint(tmp_path / "dense", chat_config(model_type="lfm2"))
    quantised = write_chat_checkpoint(tmp_path / "moe", stored=lambda path: EIGHT_BITS if ".experts" in path else None)
    for folder in (dense, quantised):
        model, _ = load(folder, dtype=name)
        assert model.dtype == dtype
        assert dtypes_of(model) >= {dtype}
        assert model(random_tokens(1, 5)).dtype == dtype


def test_an_unknown_dtype_is_refused_with_those_that_are_known() -> None:
    config = ModelConfig.from_dict(tiny_config())
    with pytest.raises(OptionError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        compute_dtype(config, "int8")
    assert compute_dtype(config, "float32") == mx.float32


def test_progress_adds_up_to_the_weights(tmp_path: Path) -> None:
    calls: list[LoadProgress] = []
    model, _ = load(write_chat_checkpoint(tmp_path), on_progress=calls.append)
    done = [call.done_bytes for call in calls]
    assert len(calls) == 1 + model.config.num_layers + 1
    assert done == sorted(set(done))
    assert done[-1] == model.num_bytes
    assert {call.total_bytes for call in calls} == {Checkpoint(tmp_path).num_bytes}
    assert done[-1] == pytest.approx(calls[-1].total_bytes, rel=0.01)
    assert all(call.elapsed_s >= 0 for call in calls)


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    folder = write_chat_checkpoint(tmp_path)
    load(folder)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LfmError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({}, SamplingParams(temperature=0.3, min_p=0.15, repetition_penalty=1.05)),
        ({"temperature": 0.7}, SamplingParams(temperature=0.7, min_p=0.15, repetition_penalty=1.05)),
        ({"do_sample": False}, SamplingParams()),
    ],
)
def test_recommended_values_become_the_models_sampling(
    tmp_path: Path, generation_config: dict[str, Any], expected: SamplingParams
) -> None:
    folder = write_chat_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    assert load(folder).model.sampling == expected


def test_the_name_in_the_config_tells_the_card(tmp_path: Path) -> None:
    raw = chat_config(model_type="lfm2", _name_or_path="LiquidAI/LFM2.5-1.2B-Instruct")
    folder = write_chat_checkpoint(tmp_path, raw, generation_config={"eos_token_id": 4})
    assert load(folder).model.sampling == SamplingParams(temperature=0.1, top_k=50, repetition_penalty=1.05)


def test_a_generation_config_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    folder = write_chat_checkpoint(tmp_path, generation_config={"temperature": -1})
    with pytest.raises(ConfigError, match=r"generation_config\.json: temperature is -1"):
        load(folder)


def mixed_storage(path: str) -> Quantization | None:
    """Queries in 8 bits beside keys in 4 and plain values; experts' gates in 4 bits beside their ups in 8."""
    if path.endswith(("k_proj", "switch_mlp.gate_proj", "feed_forward.up_proj")):
        return FOUR_BITS
    return EIGHT_BITS if path.endswith(("q_proj", "switch_mlp.up_proj")) else None


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
def test_parts_whose_storage_differs_are_kept_apart_and_compute_the_same(tmp_path: Path, model_type: str) -> None:
    raw = chat_config(model_type=model_type, moe_intermediate_size=32, intermediate_size=64)
    model, _ = load(write_chat_checkpoint(tmp_path, raw, stored=mixed_storage))
    kinds = {type(module) for module in model.modules()}
    assert SplitLinear in kinds
    assert (SplitExpertLinear in kinds) == (model_type == "lfm2_moe")
    exact = RandomWeights(ModelConfig.from_dict(raw)).quantize(mixed_storage)
    dequantised = _dequantised(exact)
    expected = build_model(ModelConfig.from_dict(raw), dequantised, mx.float32)
    assert not {SplitLinear, SplitExpertLinear} & {type(module) for module in expected.modules()}
    tokens = random_tokens(1, 40, vocab_size=VOCAB_SIZE)
    assert relative_error(model(tokens), expected(tokens)) < 1e-4
    assert relative_error(tiny_model(raw)(tokens), expected(tokens)) > 1e-3


def _dequantised(weights: RandomWeights) -> RandomWeights:
    for path, how in list(weights.stored.items()):
        parts = [weights.tensors.pop(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        weights.tensors[f"{path}.weight"] = mx.dequantize(*parts, group_size=how.group_size, bits=how.bits)
        del weights.stored[path]
    return weights


def write_large(folder: Path, *, is_ours: bool) -> Path:
    """Sixteen layers of 4 MB each in float32; ours as they are, or in bfloat16 as Hugging Face spells them."""
    raw = tiny_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        layer_types=["conv", "full_attention"] * 8,
        num_hidden_layers=16,
        moe_intermediate_size=184,
        num_dense_layers=0,
    )
    if is_ours:
        write_tokenizer(write_checkpoint(folder, raw))
        return folder
    file = write_hf_checkpoint(folder, raw) / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.save_safetensors(str(file), {name: array.astype(mx.bfloat16) for name, array in tensors.items()})
    return folder


@on_the_cpu
@pytest.mark.parametrize(("is_ours", "num_layers_twice"), [(True, 1), (False, 1.5)], ids=["ours", "hf"])
def test_loading_holds_the_weights_and_little_more_than_a_layer_twice(
    tmp_path: Path, is_ours: bool, num_layers_twice: float
) -> None:
    checkpoint = Checkpoint(write_large(tmp_path, is_ours=is_ours))
    peak_bytes, model = peak_of(lambda: load(tmp_path).model)
    layer_bytes = max(sum(array.nbytes for array in dict(tree_flatten(layer)).values()) for layer in model.layers)
    allowed_bytes = model.num_bytes + num_layers_twice * layer_bytes + MB
    assert 50 * MB < model.num_bytes < peak_bytes < allowed_bytes
    del model
    careless_bytes, _ = peak_of(lambda: build_model(checkpoint.config, ReadAtOnce(checkpoint), mx.float32))
    assert careless_bytes > allowed_bytes + 20 * MB


class ReadAtOnce:
    """Every tensor of a checkpoint, read before anything is built, as `load` must not; `lfm_mlx.build.Weights`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
        mx.eval(self.tensors)
        self.has = checkpoint.has
        self.quantization_of = checkpoint.quantization_of

    def tensor(self, name: str) -> mx.array:
        return self.tensors[name]


def peak_of(make: Any) -> tuple[int, Model]:
    """Bytes in memory at the highest moment of a call, beyond those before it."""
    gc.collect()  # What other tests left behind would otherwise be freed meanwhile.
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made = make()
    return mx.get_peak_memory() - before, made
