import json
import shutil

import mlx.core as mx
import pytest

from lfm_mlx.convert import convert, verify
from lfm_mlx.convert.write import PlannedTensor
from lfm_mlx.errors import CheckpointError, LfmError

CODES = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float32: "F32"}


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    return convert(sources["moe"], tmp_path_factory.mktemp("converted") / "out", shard_bytes=60_000).folder


@pytest.fixture
def damaged(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "damaged")


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


def cut(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])


def lengthen(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)


def delete_shard(folder):
    first_shard(folder).unlink()


def delete_config(folder):
    (folder / "config.json").unlink()


def lose_a_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.embed_tokens.scales"))


def add_a_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": mx.zeros((2, 2))}))


def misshape_a_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.embed_tokens.scales": mx.zeros((128, 2))}))


def forget_the_router(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {key: value for key, value in config["quantization"].items() if "gate" not in key}
    (folder / "config.json").write_text(json.dumps(config))


def misplace_a_tensor(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.embed_tokens.weight"] = max(index["weight_map"].values())
    file.write_text(json.dumps(index))


def rewrite(folder, change):
    shard = first_shard(folder)
    tensors = mx.load(str(shard))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(shard), tensors)


def test_what_convert_made_is_accepted(converted):
    checkpoint = verify(converted)
    assert checkpoint.quantization_of("model.layers.1.feed_forward.gate.weight").bits == 8
    assert checkpoint.quantization_of("model.embed_tokens.weight").bits == 4


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lengthen,
        delete_shard,
        delete_config,
        lose_a_tensor,
        add_a_tensor,
        misshape_a_tensor,
        forget_the_router,
        misplace_a_tensor,
    ],
)
def test_damage_is_found(damaged, damage):
    verify(damaged)
    damage(damaged)
    with pytest.raises(LfmError):
        verify(damaged)


def test_tensor_of_another_type_than_planned_is_found(converted):
    tensors = {}
    for shard in converted.glob("*.safetensors"):
        tensors |= mx.load(str(shard))
    planned = [PlannedTensor(name=name, dtype=CODES[array.dtype], shape=array.shape) for name, array in tensors.items()]
    verify(converted, planned)
    norm = PlannedTensor(name="model.embedding_norm.weight", dtype="F32", shape=(64,))
    with pytest.raises(CheckpointError, match=r"embedding_norm.weight is \('BF16', \(64,\)\), expected \('F32'"):
        verify(converted, [norm if tensor.name == norm.name else tensor for tensor in planned])
    with pytest.raises(CheckpointError, match="expected no such tensor"):
        verify(converted, planned[1:])
