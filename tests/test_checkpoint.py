"""A checkpoint in any spelling gives the same tensors; a damaged one gives one error that lists everything wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_models import (
    as_hugging_face,
    random_tokens,
    random_weights,
    tiny_config,
    tiny_dense_config,
    write_checkpoint,
    write_tensors,
)

from lfm_mlx.build import build_model
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import Quantization
from lfm_mlx.errors import CheckpointError

FFN = "model.layers.1.feed_forward"

Tensors = dict[str, mx.array]


def as_fused(ours: Mapping[str, mx.array], suffix: str = "") -> Tensors:
    """The memory layout of transformers 5: gate and up of all experts in one tensor."""
    tensors = as_hugging_face({name: array for name, array in ours.items() if ".switch_mlp." not in name})
    for name, gate in ours.items():
        if name.endswith("switch_mlp.gate_proj.weight"):
            prefix = name.removesuffix(".switch_mlp.gate_proj.weight")
            up, down = (ours[f"{prefix}.switch_mlp.{which}_proj.weight"] for which in ("up", "down"))
            tensors[f"{prefix}.experts.gate_up_proj{suffix}"] = mx.concatenate([gate, up], axis=1)
            tensors[f"{prefix}.experts.down_proj{suffix}"] = down
    return tensors


def logits(folder: Path) -> np.ndarray:
    checkpoint = Checkpoint(folder)
    return np.array(build_model(checkpoint.config, checkpoint, mx.float32)(random_tokens(2, 12)))


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "hugging_face": as_hugging_face,
    "fused": as_fused,
    "fused_weight": lambda ours: as_fused(ours, ".weight"),
    "hugging_face_with_tied_head": lambda ours: {**as_hugging_face(ours), "lm_head.weight": mx.zeros((97, 32))},
}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_tensors_and_logits_of_the_mlx_layout(tmp_path, spelling, num_shards):
    raw = tiny_config(conv_bias=True, conv_L_cache=4)
    ours = random_weights(raw)
    folder = write_tensors(tmp_path / "a", raw, SPELLINGS[spelling](ours), num_shards)
    checkpoint = Checkpoint(folder)
    assert checkpoint.names == list(ours)
    for name, expected in ours.items():
        assert mx.array_equal(checkpoint.tensor(name), expected), name
    np.testing.assert_array_equal(logits(folder), logits(write_tensors(tmp_path / "b", raw, ours)))


@pytest.mark.parametrize("spelling", [as_hugging_face, as_fused, dict], ids=lambda spelling: spelling.__name__)
def test_control_gate_and_up_in_the_wrong_order_give_other_logits(tmp_path, spelling):
    raw = tiny_config()
    ours = random_weights(raw)
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = {".".join(other.get(part, part) for part in name.split(".")): array for name, array in ours.items()}
    wrong, right = write_tensors(tmp_path / "a", raw, spelling(swapped)), write_tensors(tmp_path / "b", raw, ours)
    assert np.abs(logits(wrong) - logits(right)).max() > 0.1


def test_a_dense_model_gives_the_same_tensors_in_both_spellings(tmp_path):
    raw = tiny_dense_config()
    ours = random_weights(raw)
    turned = {n: a.transpose(0, 2, 1) if n.endswith(".conv.conv.weight") else a for n, a in ours.items()}
    a, b = write_tensors(tmp_path / "a", raw, turned, 2), write_tensors(tmp_path / "b", raw, ours)
    np.testing.assert_array_equal(logits(a), logits(b))


@pytest.mark.parametrize("spelling", [as_hugging_face, as_fused, dict], ids=lambda spelling: spelling.__name__)
def test_a_checkpoint_counts_each_stored_byte_once_and_no_dropped_one(tmp_path, spelling):
    raw = tiny_config()
    ours = random_weights(raw)
    checkpoint = Checkpoint(write_tensors(tmp_path, raw, {**spelling(ours), "lm_head.weight": mx.zeros((97, 32))}))
    assert checkpoint.num_bytes == sum(array.nbytes for array in ours.values())
    name = f"{FFN}.switch_mlp.down_proj.weight"
    assert checkpoint.stored_bytes(name) == ours[name].nbytes


def test_weights_called_weights_are_found_too(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.00.safetensors")
    assert Checkpoint(folder).has("model.embed_tokens.weight")


# What is wrong with the tensors: name -> (change, what the error says).

Damage = Callable[[Tensors], object]

DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        r"model.layers.1.self_attn.q_proj.weight is missing, expected \(32, 32\)",
    ),
    "missing_embedding": (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
    "missing_bias": (lambda t: t.pop(f"{FFN}.expert_bias"), rf"{FFN}.expert_bias is missing, expected \(8,\)"),
    "missing_expert": (
        lambda t: t.pop(f"{FFN}.experts.3.w3.weight"),
        rf"{FFN}.switch_mlp.up_proj.weight: experts \[3\] missing, none extra, expected 8",
    ),
    "extra_expert": (
        lambda t: t.update({f"{FFN}.experts.8.w3.weight": mx.zeros((24, 32))}),
        rf"{FFN}.switch_mlp.up_proj.weight: experts none missing, \[8\] extra, expected 8",
    ),
    "extra": (
        lambda t: t.update({"model.layers.9.conv.in_proj.weight": mx.zeros((2, 3))}),
        r"model.safetensors: model.layers.9.conv.in_proj.weight \(2, 3\) has no place in this model",
    ),
    "extra_bias": (
        lambda t: t.update({"model.layers.0.conv.in_proj.bias": mx.zeros((96,))}),
        r"model.layers.0.conv.in_proj.bias \(96,\) has no place",
    ),
    "misshapen": (
        lambda t: t.update({"model.layers.0.conv.in_proj.weight": mx.zeros((96, 16))}),
        r"model.safetensors: model.layers.0.conv.in_proj.weight is \(96, 16\), expected \(96, 32\)",
    ),
    "misshapen_taps": (
        lambda t: t.update({"model.layers.0.conv.conv.weight": mx.zeros((32, 1, 4))}),
        r"model.layers.0.conv.conv.weight is \(32, 1, 4\), expected \(32, 3, 1\)",
    ),
    "misshapen_expert": (
        lambda t: t.update({f"{FFN}.experts.3.w2.weight": mx.zeros((24, 32))}),
        rf"{FFN}.experts.3.w2.weight is \(24, 32\), expected \(32, 24\)",
    ),
    "wrong_dtype": (
        lambda t: t.update({"model.embedding_norm.weight": mx.zeros((32,), dtype=mx.int32)}),
        "model.embedding_norm.weight is I32, expected one of F32, F16, BF16",
    ),
    "stored_in_two_spellings": (
        lambda t: t.update({f"{FFN}.experts.down_proj": mx.zeros((8, 32, 24))}),
        rf"{FFN}.*down_proj",
    ),
    "quantised_without_a_block": (
        lambda t: t.update({"model.embed_tokens.scales": mx.zeros((97, 1))}),
        "model.embed_tokens.scales is stored, but config.json has no quantization block",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_wrong_tensor_is_named_with_what_was_found_and_expected(tmp_path, damage):
    change, message = DAMAGES[damage]
    raw = tiny_config()
    tensors = as_hugging_face(random_weights(raw))
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(write_tensors(tmp_path, raw, tensors))
    assert str(tmp_path) in str(caught.value)


def test_one_error_lists_all_that_is_wrong(tmp_path):
    raw = tiny_config()
    tensors = as_hugging_face(random_weights(raw))
    chosen = ("missing", "extra", "misshapen", "wrong_dtype", "missing_expert")
    for damage in chosen:
        DAMAGES[damage][0](tensors)
    with pytest.raises(CheckpointError, match=r"5 problems; the files do not fit config.json") as caught:
        Checkpoint(write_tensors(tmp_path, raw, tensors))
    for damage in chosen:
        caught.match(DAMAGES[damage][1])


def test_a_checkpoint_of_another_model_gives_a_list_of_bounded_length(tmp_path):
    tensors = random_weights(tiny_dense_config(hidden_size=64, num_hidden_layers=4))
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d+ more") as caught:
        Checkpoint(write_tensors(tmp_path, tiny_config(), tensors))
    assert len(str(caught.value).splitlines()) <= 22


# Quantised tensors.


def quantized_folder(folder: Path, mode: str = "affine") -> Path:
    how = Quantization(group_size=32, bits=4, mode=mode)
    raw = tiny_dense_config(intermediate_size=64)
    return write_checkpoint(folder, raw, stored=lambda path: how if path.endswith("in_proj") else None)


def rewritten(folder: Path, change: Damage) -> Path:
    """The folder with its tensors changed."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    change(tensors)
    return write_tensors(folder, json.loads((folder / "config.json").read_text()), tensors)


PATH = "model.layers.0.conv.in_proj"


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("affine", lambda t: t.pop(f"{PATH}.biases"), rf"{PATH}.biases is missing, expected \(96, 1\)"),
        ("affine", lambda t: t.pop(f"{PATH}.scales"), rf"{PATH}.weight is \(96, 4\), expected \(96, 32\)"),
        (
            "affine",
            lambda t: t.update({f"{PATH}.scales": mx.zeros((96, 2))}),
            r"is \(96, 2\), expected \(96, 1\) \(4 bits",
        ),
        ("affine", lambda t: t.update({f"{PATH}.weight": mx.zeros((96, 4))}), f"{PATH}.weight is F32, expected U32"),
        (
            "affine",
            lambda t: t.update({f"{PATH}.scales": mx.zeros((96, 1), dtype=mx.uint8)}),
            f"{PATH}.scales is U8, expected F32 or F16 or BF16",
        ),
        ("mxfp4", lambda t: t.update({f"{PATH}.scales": mx.zeros((96, 1))}), f"{PATH}.scales is F32, expected U8"),
        (
            "mxfp4",
            lambda t: t.update({f"{PATH}.biases": mx.zeros((96, 1))}),
            "biases is stored, but mode mxfp4 has none",
        ),
    ],
    ids=["no_biases", "no_scales", "scales_shape", "weight_dtype", "scales_dtype", "fp_scales_dtype", "fp_biases"],
)
def test_a_wrong_quantised_tensor_is_named(tmp_path, mode, change, message):
    folder = quantized_folder(tmp_path, mode)
    Checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(rewritten(folder, change))


def with_quantization(folder: Path, block: object) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization": block}))
    return folder


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"group_size": 32, "bits": 8}, r"in_proj.weight is \(96, 4\), expected \(96, 8\) \(8 bits in groups of 32"),
        ({"group_size": 64, "bits": 4}, "rows of 32 values, expected a multiple of group_size 64"),
        ({"group_size": 32, "bits": 4, PATH: False}, "quantization says false for it"),
    ],
    ids=["bits", "group_size", "false"],
)
def test_a_quantization_block_that_does_not_fit_the_tensors_is_refused(tmp_path, block, message):
    folder = quantized_folder(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(with_quantization(folder, block))
