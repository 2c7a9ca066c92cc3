import json
import struct

import mlx.core as mx
import pytest
from safetensors import safe_open

from lfm_mlx.config import Quantization
from lfm_mlx.convert.write import PlannedTensor, allocate, header_bytes, plan_shards, plan_tensors, write_index

PLANNED = [
    PlannedTensor(name="a.weight", dtype="BF16", shape=(5, 7)),
    PlannedTensor(name="b.bias", dtype="F32", shape=(3,)),
    PlannedTensor(name="c.weight", dtype="U32", shape=(4, 2, 3)),
    PlannedTensor(name="d.scales", dtype="U8", shape=(4, 2)),
]


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_allocated_files_hold_every_tensor_as_zeros(tmp_path, shard_bytes):
    shards = plan_shards(PLANNED, shard_bytes)
    allocate(tmp_path, shards)
    loaded = {}
    for shard in shards:
        with safe_open(tmp_path / shard.file, framework="numpy") as file:
            assert file.metadata() == {"format": "mlx"}
        loaded |= mx.load(str(tmp_path / shard.file))
    assert {name: array.shape for name, array in loaded.items()} == {t.name: t.shape for t in PLANNED}
    assert not any(array.astype(mx.float32).any().item() for array in loaded.values())


def test_allocating_again_keeps_the_data(tmp_path):
    (shard,) = plan_shards(PLANNED, 10**9)
    allocate(tmp_path, [shard])
    file = tmp_path / shard.file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    allocate(tmp_path, [shard])
    assert file.read_bytes()[-1:] == b"x"


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 3, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)])
def test_plan_is_what_mlx_makes(mode, bits, group_size):
    how = Quantization(mode=mode, bits=bits, group_size=group_size)
    made = mx.quantize(mx.zeros((2, 8, 64), mx.bfloat16), group_size=group_size, bits=bits, mode=mode)
    planned = plan_tensors("x.weight", (2, 8, 64), "BF16", how)
    assert [tensor.name for tensor in planned] == ["x.weight", "x.scales", "x.biases"][: len(made)]
    assert [tensor.shape for tensor in planned] == [array.shape for array in made]
    assert [tensor.num_bytes for tensor in planned] == [array.nbytes for array in made]


@pytest.mark.parametrize("count", range(1, 9))
def test_data_starts_at_a_multiple_of_eight(count):
    header = header_bytes([PlannedTensor(name="x" * count, dtype="F32", shape=(1,))])
    assert len(header) % 8 == 0
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
    assert json.loads(header[8:])["x" * count]["data_offsets"] == [0, 4]


def test_shards_keep_the_order_and_the_limit():
    sizes = [40, 60, 50, 200, 10, 10]
    tensors = [PlannedTensor(name=f"t{i}", dtype="U8", shape=(n,)) for i, n in enumerate(sizes)]
    shards = plan_shards(tensors, 100)
    assert [[t.num_bytes for t in shard.tensors] for shard in shards] == [[40, 60], [50], [200], [10, 10]]
    assert [shard.file for shard in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]


def test_one_shard_is_called_model_safetensors():
    (shard,) = plan_shards(PLANNED, 10**9)
    assert shard.file == "model.safetensors"


def test_index_places_every_tensor_and_sums_the_bytes(tmp_path):
    shards = plan_shards(PLANNED, 100)
    write_index(tmp_path, shards, num_parameters=99)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.num_bytes for t in PLANNED), "total_parameters": 99}
    assert list(index["weight_map"]) == sorted(t.name for t in PLANNED)
    assert index["weight_map"] == {t.name: shard.file for shard in shards for t in shard.tensors}
